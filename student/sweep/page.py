"""sweep.html."""

from student.sweep.results import Row
from student.sweep.spec import SweepSpec


def page(rows: list[Row], spec: SweepSpec, store: str) -> str:
    return ""
