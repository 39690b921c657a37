"""Shapes that a format can hold."""

from __future__ import annotations

from student.errors import UserError
from student.export.source import ExportSource


def require_multiple(source: ExportSource, axis: int, multiple: int, what: str, fix: str) -> None:
    """UserError unless rows (axis 0) or columns (axis 1) of every ternary matrix are a multiple."""
    wrong = {name: shape[axis] for name, shape in source.shapes.items() if shape[axis] % multiple}
    if wrong:
        name, size = next(iter(wrong.items()))
        kind = ("rows", "columns")[axis]
        raise UserError(
            f"{source.directory}: {name} has {size} {kind}, not a multiple of {multiple} ({len(wrong)} such "
            f"layers): {what}; {fix}"
        )
