import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LONG = ("compression.md", "infinite_width.md")


def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            path,
            id=path.name,
            marks=pytest.mark.slow if path.name in LONG else (),
        )
        for path in DOCUMENTS[1:]
    ],
)
def test_the_python_blocks_of_the_guides_run(document, tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.S):
        exec(block, names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_commands_name_files_that_exist():
    for file in re.findall(r"--config=(configs/\w+\.py)", README):
        assert (ROOT / file).is_file()
