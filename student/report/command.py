"""`distily-train report DIR...`: the page about runs, written where it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distily.html.page import why_not_page, write
from student.errors import UserError
from student.report.files import read_runs
from student.report.page import REPORT, runs_page


def report(directories: Sequence[Path], out: Path | None) -> Path:
    """Write the page and return its file: `out`, else report.html in the only directory or in this one.

    Raises UserError for a directory that is no run, and for a file that cannot be written.
    """
    file = out or (directories[0] / REPORT if len(directories) == 1 else Path(REPORT))
    runs = read_runs(directories)
    if problem := why_not_page(file):
        raise UserError(f"--out {file} {problem}")
    write(file, runs_page(runs))
    return file
