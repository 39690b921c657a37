"""What a library has to say beside its results: one logger, which the command lines show on stderr.

`logging.getLogger("distily")`: INFO for what was chosen for the user, WARNING for what may surprise them.
"""

from __future__ import annotations

import logging
import sys

from distily.safety.redaction import redact
from distily.text import printable

LOG = logging.getLogger("distily")


class _Stderr(logging.Handler):
    """Warnings begin with the program's name, as its errors do."""

    def __init__(self, program: str) -> None:
        super().__init__(logging.INFO)
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        # Names in it come from data; a line of a log is one line.
        line = printable(redact(record.getMessage()))
        if record.levelno >= logging.WARNING:
            behind_bar = "\n" * sys.stderr.isatty()
            line = f"{behind_bar}{self._program}: {line}"
        sys.stderr.write(line + "\n")


def show_on_stderr(program: str) -> None:
    """Have the command `program` print what is logged."""
    for handler in LOG.handlers[:]:
        LOG.removeHandler(handler)
    LOG.addHandler(_Stderr(program))
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
