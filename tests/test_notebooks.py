"""The notebooks run as they stand, with a tiny model in place of one of the hub."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fit_helpers import save_tiny_bert

BOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the notebook's own machinery
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("STEADYTUNE_MODEL", save_tiny_bert(tmp_path / "bert"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_two():
    assert [path.stem for path in BOOKS] == ["table", "trainer"]
