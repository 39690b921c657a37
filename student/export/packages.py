"""Packages that single formats need."""

from __future__ import annotations

from importlib.util import find_spec

from student.errors import UserError


def require_package(format: str, name: str) -> None:
    """UserError where the package that writes a format is not installed."""
    if find_spec(name) is None:
        package = name.replace("_", "-")
        raise UserError(
            f"--format {format} needs the package {package}; install the extra [export], or pip install "
            f"{package}"
        )
