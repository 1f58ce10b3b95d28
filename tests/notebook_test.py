import pathlib

import jupytext
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_matches_its_script(notebook):
    def cells(path):
        return [(c.cell_type, c.source) for c in jupytext.read(path).cells]

    assert cells(notebook) == cells(notebook.with_suffix(".py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the kernel's own machinery
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_top_to_bottom(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(notebook.parent.parent))
    book = jupytext.read(notebook)
    # The kernel of this environment, whatever kernels are registered on the machine.
    manager = nbclient.client.KernelManager()
    manager.kernel_spec_manager.ensure_native_kernel = True
    client = nbclient.NotebookClient(
        book, km=manager, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
    )
    assert "test accuracy" in printed
    assert "base_model must be the one the adapter was trained on" in printed
    assert (tmp_path / "digits_adapter.safetensors").stat().st_size < 300_000
