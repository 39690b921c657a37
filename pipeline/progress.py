"""What a user sees while the teacher runs: a bar on a terminal, a line per shard in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distily.text import printable

# In a log: how often a line tells of reading, tokenising and writing.
_SECONDS_PER_LINE = 10.0
# On a terminal: how often the bar of reading and tokenising moves.
_SECONDS_PER_UPDATE = 0.2


@contextmanager
def bytes_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (bytes done, bytes in all)."""
    with _bar(console, what, DownloadColumn()) as advance:
        yield advance


@contextmanager
def count_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (done, in all): of tokens, files, whatever is counted."""
    with _bar(console, what, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(console: Console, what: str, amount: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), amount, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Reporter(Protocol):
    """Told of the work by `pipeline.generate.run`; shows it or not."""

    def stage(self, text: str) -> None: ...
    def reading(self, rows: int) -> None: ...
    def tokenised(self, documents: int, tokens: int) -> None: ...
    def writing(self, texts_done: int, texts_total: int) -> None: ...
    def wrote(self, texts: int, tokens: int) -> None: ...
    def start(self, tokens_done: int, tokens_total: int | None) -> None: ...
    def advance(self, tokens: int) -> None: ...
    def skip(self, tokens: int) -> None: ...
    def committed(self, rows: int, size: int) -> None: ...


class ConsoleReporter:
    """Progress with tokens per second, remaining time and bytes written, on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}{task.fields[of]} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]:,.0f} tok/s"),
            TextColumn("{task.fields[size]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._reading = self._task_of("read", "rows", size="")
        self._tokenising = self._task_of("tokenise", "documents", size="")
        self._writing = self._task_of("write", "texts", size="")
        self._task = self._task_of("capture", "tokens", size="0 bytes")
        self._texts = self._texts_total = self._new_tokens = 0
        self._counted = 0
        self._said = self._write_began = self._count_began = self._began = time.monotonic()
        self._done = self._offset = self._bytes = 0
        self._total: int | None = 0

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, soft_wrap=True, markup=False, emoji=False)

    def reading(self, rows: int) -> None:
        self._so_far(self._reading, rows, 0, f"read {rows:,} rows")

    def tokenised(self, documents: int, tokens: int) -> None:
        self._so_far(
            self._tokenising, documents, tokens, f"tokenised {documents:,} documents, {tokens:,} tokens"
        )

    def _so_far(self, task: TaskID | None, count: int, tokens: int, line: str) -> None:
        """Something whose end is not known: a bar, or now and then a line."""
        now = time.monotonic()
        if count <= self._counted:  # another data set, or another stage of its reading
            self._count_began = self._said = now
            self._hide_counts()
        self._counted = count
        if task is not None and now - self._said >= _SECONDS_PER_UPDATE:
            self._said = now
            self._bar.start_task(task)
            rate = tokens / max(now - self._count_began, 1e-9)
            self._bar.update(task, completed=count, rate=rate, visible=True)
        elif task is None and now - self._said >= _SECONDS_PER_LINE:
            self._said = now
            self.stage(line)

    def _hide_counts(self) -> None:
        for task in (self._reading, self._tokenising):
            if task is not None:
                self._bar.update(task, visible=False)

    def writing(self, texts_done: int, texts_total: int) -> None:
        self._hide_counts()
        self._texts, self._texts_total, self._new_tokens = texts_done, texts_total, 0
        self._said = self._write_began = time.monotonic()
        if self._writing is not None and texts_done < texts_total:
            self._bar.start_task(self._writing)
            of = f"/{texts_total:,}"
            self._bar.update(self._writing, total=texts_total, completed=texts_done, of=of, visible=True)

    def wrote(self, texts: int, tokens: int) -> None:
        self._texts += texts
        self._new_tokens += tokens
        now = time.monotonic()
        rate = self._new_tokens / max(now - self._write_began, 1e-9)
        if self._writing is not None:
            self._bar.update(self._writing, completed=self._texts, rate=rate)
        elif now - self._said >= _SECONDS_PER_LINE or self._texts == self._texts_total:
            self._said = now
            self.stage(f"written {self._texts:,}/{self._texts_total:,} texts, {rate:,.0f} tok/s")

    def start(self, tokens_done: int, tokens_total: int | None) -> None:
        self._hide_counts()
        self._began, self._done, self._offset, self._total = time.monotonic(), 0, tokens_done, tokens_total
        if self._task is not None:
            self._bar.start_task(self._task)
            of = "" if tokens_total is None else f"/{tokens_total:,}"
            self._bar.update(self._task, total=tokens_total, completed=tokens_done, of=of, visible=True)

    def advance(self, tokens: int) -> None:
        self._done += tokens
        self._update()

    def skip(self, tokens: int) -> None:
        self._offset += tokens
        self._update()

    def committed(self, rows: int, size: int) -> None:
        self._bytes += size
        self._update()
        if self._task is None:
            done, rate = self._offset + self._done, self._rate()
            of = left = ""
            if self._total is not None:
                of = f"/{self._total:,}"
                left = f", {max(self._total - done, 0) / rate if rate else 0.0:,.0f} s left"
            self.stage(
                f"committed {rows:,} rows: {done:,}{of} tokens, {rate:,.0f} tok/s, "
                f"{decimal(self._bytes)}{left}"
            )

    def _task_of(self, what: str, unit: str, size: str) -> TaskID | None:
        """A hidden line of the bar; None where there is no terminal."""
        if not self._console.is_terminal:
            return None
        return self._bar.add_task(
            what, total=None, start=False, visible=False, rate=0.0, size=size, unit=unit, of=""
        )

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._began, 1e-9)

    def _update(self) -> None:
        if self._task is not None:
            self._bar.update(
                self._task, completed=self._offset + self._done, rate=self._rate(), size=decimal(self._bytes)
            )
