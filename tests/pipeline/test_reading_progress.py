"""While a data set is read and tokenised, a log gets a line now and then, and a terminal a bar."""

from __future__ import annotations

import io
import itertools
import time

import pytest
from rich.console import Console

from pipeline.progress import ConsoleReporter


def told(terminal: bool, monkeypatch: pytest.MonkeyPatch, documents: int = 50) -> str:
    """What is printed of 50 s of reading and `documents` s of tokenising; a look at the clock takes 1 s."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=200)
    with ConsoleReporter(console) as report:
        for rows in range(50):
            report.reading(1000 * (rows + 1))
        for document in range(documents):
            report.tokenised(document + 1, 7 * (document + 1))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(False, monkeypatch).splitlines()
    reading = [line for line in lines if line.startswith("read ") and line.endswith(" rows")]
    tokenising = [line for line in lines if line.startswith("tokenised ") and line.endswith(" tokens")]
    assert 3 <= len(reading) <= 5 and 3 <= len(tokenising) <= 5 and len(lines) == len(reading + tokenising)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "50,000 rows" in told(True, monkeypatch, documents=0)
    shown = told(True, monkeypatch)
    assert "50 documents" in shown and "tokenised" not in shown
