"""Execute examples/notebook.ipynb in place: `python scripts/run_notebook.py`, from the repository's root.

Each code cell keeps the digest of the source that its outputs are of; `tests/test_notebook.py` compares.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from blake3 import blake3
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"


def executed(source: Path, timeout: int) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; CellExecutionError where a cell fails. timeout: seconds per cell."""
    notebook = nbformat.read(source, as_version=4)
    there = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=timeout, resources=there, record_timing=False).execute()
    for cell in code_cells(notebook):
        cell.metadata["executed"] = source_digest(cell)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that are run, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source_digest(cell: nbformat.NotebookNode) -> str:
    """What the outputs of a cell belong to."""
    return blake3(cell.source.encode()).hexdigest(length=8)


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK, timeout=3600), NOTEBOOK)
