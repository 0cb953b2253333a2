"""The notebooks of examples/ run in an empty folder without a network, and show what is committed.

Their outputs are those of such a run: ``jupyter nbconvert --execute --inplace NOTEBOOK``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def shown(notebook: Any) -> list[set[str]]:
    """Return the kinds of what each cell of code shows: an image, a table, text."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", [output.output_type])}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_an_empty_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkout that is tested, and the command that is installed beside this Python.
    modules = [str(ROOT / ".types"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(modules))
    commands = [str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(commands))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a user's process has none
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(executed, timeout=300, resources=folder).execute()  # raises a cell's error
    assert shown(executed) == shown(committed)
    assert sum("image/png" in kinds for kinds in shown(committed)) == 1


def test_there_are_two_notebooks_and_none_names_this_machine() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["add_a_method", "your_model"]
    for path in NOTEBOOKS:
        text = path.read_text()
        assert "/tmp/" not in text
        assert "Warning" not in text
