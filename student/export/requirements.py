"""What single formats need: packages, and shapes that they can hold."""

from __future__ import annotations

from importlib.util import find_spec

from student.errors import UserError
from student.export.source import ExportSource


def require_package(format: str, name: str) -> None:
    """UserError where the package that writes a format is not installed."""
    if find_spec(name) is None:
        package = name.replace("_", "-")
        raise UserError(
            f"--format {format} needs the package {package}; install the extra [export], or pip install "
            f"{package}"
        )


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
