"""report.html: one page about one or several trainings, from the files that they wrote."""

from student.report.files import RunFiles, read_run, read_runs
from student.report.page import runs_page, write_report

__all__ = ["RunFiles", "read_run", "read_runs", "runs_page", "write_report"]
