"""The notebooks run from top to bottom, and what is stored in them is a run of this code, small enough to commit."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "new_pruner"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_stored_as_run(path):
    stored = nbformat.read(path, as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(cell.outputs) for cell in code) >= 1 and path.stat().st_size < 500_000
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    fresh = nbformat.read(path, as_version=4)
    for cell in fresh.cells:
        cell.source = cell.source.replace("Demo(n_scenes=5)", "Demo(n_scenes=1)")  # of a table, which is not compared
    place = {"metadata": {"path": path.parent}}
    NotebookClient(fresh, timeout=240, shutdown_kernel="immediate", resources=place).execute()
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        if old.cell_type == "code":
            assert printed(old) == printed(new)


def printed(cell):
    """What a cell printed, progress bars left out."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
