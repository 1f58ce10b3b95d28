import os
import pathlib
import shutil
import subprocess
import sys

import jupytext
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_matches_its_script(notebook):
    def cells(path):
        return [(c.cell_type, c.source) for c in jupytext.read(path).cells]

    assert cells(notebook) == cells(notebook.with_suffix(".py"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_top_to_bottom(notebook, tmp_path):
    copy = tmp_path / notebook.name
    shutil.copy(notebook, copy)
    # A process of its own: the notebook client leaves sockets to the interpreter.
    subprocess.run(
        [sys.executable, "-m", "jupyter", "execute", "--inplace", str(copy)],
        check=True,
        cwd=tmp_path,
        timeout=900,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(notebook.parent.parent)},
    )
    printed = "".join(
        output.get("text", "")
        for cell in jupytext.read(copy).cells
        for output in cell.get("outputs", [])
    )
    assert "test accuracy" in printed
    assert "base_model must be the one the adapter was trained on" in printed
    assert (tmp_path / "digits_adapter.safetensors").stat().st_size < 300_000
