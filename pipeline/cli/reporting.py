"""`distily-cache report`: a page about a store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distily.html.page import why_not_page, write
from distily.text import one_line, printable
from pipeline.cli.exits import exit_codes
from pipeline.cli.options import JsonOption, StoreArgument
from pipeline.cli.output import print_json
from pipeline.errors import RequestError


def report(
    store: StoreArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="Default: NAME-report.html in this directory."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Samples to read for what is measured on features, at most.")
    ] = 64,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about STORE: teacher, bytes, mass, a sample, costs, provenance."""
    from pipeline.report import default_file, gather, store_page

    with exit_codes():
        file = out or Path(default_file(store))
        if problem := why_not_page(file):
            raise RequestError(f"--out {file} {problem}")
        found = gather(store, samples)
        if found.damage:
            sys.stderr.write(f"distily-cache: left out: {one_line(found.damage, None)}\n")
        write(file, store_page(found))
        if as_json:
            print_json({"report": str(file)})
        else:
            sys.stdout.write(f"{printable(str(file))}\n")
