"""`--version` of both command lines."""

# Without postponed annotations: typer reads them, and one of them holds a local function.
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
