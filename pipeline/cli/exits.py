"""How a command ends: 0 done, 2 bad request, 1 failure, 130 and 143 stopped by Ctrl-C and by SIGTERM."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from featurestore.errors import BAD_REQUESTS, FeatureStoreError
from pipeline.errors import PipelineError, RequestError

_GOES_ON = "the same command goes on where this one stopped"


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever tidies up after Ctrl-C does so now."""


def terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler of SIGTERM."""
    raise Terminated


@contextmanager
def exit_codes(verbose: bool = False) -> Iterator[None]:
    """Known errors become one line on stderr and the exit code of the contract; bugs keep their traceback."""
    try:
        yield
    except (RequestError, *BAD_REQUESTS) as error:
        _fail(str(error), 2)
    except (PipelineError, FeatureStoreError) as error:
        if verbose:
            traceback.print_exc()
        _fail(str(error), 1)
    except Terminated:
        _fail(f"terminated; {_GOES_ON}", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_GOES_ON}", 128 + signal.SIGINT)


def _fail(message: str, code: int) -> None:
    sys.stderr.write("distily-cache: " + " ".join(message.split()) + "\n")
    raise typer.Exit(code)
