"""Sections in processes of their own: a row that fails, hangs or dies is noted, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distily.text import one_line

Record = dict[str, Any]
FAILED, ABSENT = "failed", "absent"  # why there are no numbers: it went wrong, or there is nothing to run
_POLL_SECONDS = 0.05


def measure_rows(rows: Sequence[str], measure: Callable[[str], Record], results: Path) -> int:
    """In the process of a section: measure one row after the other up to one that fails; the exit code."""
    for row in rows:
        try:
            note(results, row, measure(row))
        except Exception as error:  # whatever it is, it goes into the table, and this process ends
            traceback.print_exc()
            note(results, row, {FAILED: f"{type(error).__name__}: {one_line(error, None)}"})
            return 1
    return 0


def note(results: Path, row: str, record: Record) -> None:
    """Add a record to the file of results, one JSON object a line."""
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"row": row} | record) + "\n")


def read(results: Path) -> dict[str, Record]:
    """The records so far, by row."""
    if not results.is_file():
        return {}
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {record.pop("row"): record for record in records}


def run_rows(
    command: Sequence[str],
    rows: Sequence[str],
    results: Path,
    *,
    log: Path,
    seconds: float,
    deadline: float,
    environment: Mapping[str, str],
) -> None:
    """Have `command ROWS` note a record of each row in `results`; behind a row that fails it runs again for
    those that are left.

    seconds: for a row. deadline: of time.monotonic(), behind which no row is begun.
    """
    left = list(rows)
    while left:
        if time.monotonic() >= deadline:
            for row in left:
                note(results, row, {FAILED: "not begun: the time was over"})
            return
        ended = _run([*command, *left], results, log, seconds, deadline, environment)
        known = read(results)
        done = [row for row in left if row in known]
        left = left[len(done) :]
        noted = bool(done) and FAILED in known[done[-1]]
        if left and not noted:
            note(results, left.pop(0), {FAILED: ended})


def _run(
    command: Sequence[str],
    results: Path,
    log: Path,
    seconds: float,
    deadline: float,
    environment: Mapping[str, str],
) -> str:
    """Run a process up to its end, or to that of its time; how it ended, in words."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        size, until = -1, 0.0
        while process.poll() is None:
            now = time.monotonic()
            if (grown := results.stat().st_size if results.is_file() else 0) != size:
                size, until = grown, min(now + seconds, deadline + seconds)
            if now >= until:
                break
            time.sleep(_POLL_SECONDS)
        late = process.poll() is None
        _end_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    how = f"no result within {seconds:.0f} s" if late else f"ended with exit code {process.returncode}"
    return f"{how}: {last}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a process and of those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
