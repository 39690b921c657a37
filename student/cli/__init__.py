"""The `distily-train` command line."""

from student.cli.commands import app, main

__all__ = ["app", "main"]
