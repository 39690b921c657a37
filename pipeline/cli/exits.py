"""How a command ends: 0 done, 2 bad request, 1 failure; 130 and 143: see `distily.system.stopping`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from distily.errors import DistilyError
from distily.safety.redaction import redact
from distily.text import one_line, printable
from featurestore.errors import BAD_REQUESTS
from pipeline.errors import RequestError

# What a command that is stopped says, where it may be repeated.
RESUMES = "what is committed is kept, the same command resumes"


@contextmanager
def exit_codes(verbose: bool = False) -> Iterator[None]:
    """Known errors become one line on stderr and the exit code of the contract; bugs keep their traceback."""
    try:
        yield
    except (RequestError, *BAD_REQUESTS) as error:
        _fail(str(error), 2)
    except DistilyError as error:
        if verbose:
            sys.stderr.write(printable(redact(traceback.format_exc()), keep="\n"))
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"distily-cache: {one_line(message, None)}\n")
    raise typer.Exit(code)
