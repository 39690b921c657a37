"""What both command lines have in common: `--version`, help set as prose, quiet libraries."""

# Without postponed annotations: typer reads them, and one of them holds a local function.
import inspect
import os
import re
import sys
from typing import Annotated

import typer

from distily import __version__


def add_version(app: typer.Typer, program: str) -> None:
    """Give `program` the option `--version`, which prints `PROGRAM VERSION` and ends."""

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"{program} {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass


def reflow_help(app: typer.Typer) -> None:
    """Let the help of each command fill the terminal's lines; typer keeps the line breaks of docstrings."""
    for command in app.registered_commands:
        text = inspect.cleandoc(command.help or (command.callback and command.callback.__doc__) or "")
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def quiet_libraries(quiet: bool = False) -> None:
    """No progress bars of Hugging Face's libraries where stderr is no terminal, or `quiet` is asked for."""
    if not quiet and sys.stderr.isatty():
        return
    # Read when they are imported, and inherited by processes that are started.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()
