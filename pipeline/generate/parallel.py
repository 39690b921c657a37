"""`generate --data-parallel N`: N engines on one store, each in a process of its own with its own GPUs.

This process reads the data set and gives each the next shard when it asks for one, so that none is captured
twice; each encodes and commits its own. It shows their progress and ends them. Where one fails, the others
capture what is left, and the same command captures the shards that the failed one had taken.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from distily.errors import DistilyError
from distily.logs import show_on_stderr
from distily.system.command_line import quiet_libraries
from pipeline.errors import EngineError, RequestError
from pipeline.generate.committer import advise_of
from pipeline.generate.passes import CaptureJob, Run, capture_here
from pipeline.generate.planning import Pass, Passes, Shard
from pipeline.progress import Reporter
from pipeline.request.target import create_store

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# What a process tells beside the calls of a Reporter.
_DONE, _FAILED = "done", "failed"
# What it asks for, and is answered.
_BEGIN, _TAKE = "begin", "take"


@dataclass(frozen=True)
class Share:
    """What one process sees of the machine: GPUs as CUDA_VISIBLE_DEVICES names them, or cores of the CPU."""

    gpus: str = ""
    cores: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return f"GPU {self.gpus}" if self.gpus else f"cores {','.join(map(str, sorted(self.cores)))}"


def shares(engines: int, gpus_each: int, gpus: Sequence[str], cores: Sequence[int]) -> list[Share]:
    """Divide a machine among engines: `gpus_each` GPUs for each, or without GPUs the cores, evenly.

    Raises:
        RequestError: there are too few.

    Example:
        >>> [str(share) for share in shares(2, 2, ["0", "1", "2", "3"], range(8))]
        ['GPU 0,1', 'GPU 2,3']
    """
    if gpus:
        if engines * gpus_each > len(gpus):
            raise RequestError(
                f"--data-parallel {engines}: {engines * gpus_each} GPUs are needed (--tensor-parallel-size "
                f"{gpus_each}) and {len(gpus)} are visible; give --data-parallel {len(gpus) // gpus_each}"
            )
        starts = range(0, engines * gpus_each, gpus_each)
        return [Share(gpus=",".join(gpus[start : start + gpus_each])) for start in starts]
    if engines > len(cores):
        raise RequestError(
            f"--data-parallel {engines}: there is no GPU, and {len(cores)} cores; give at most "
            f"--data-parallel {len(cores)}"
        )
    edges = [len(cores) * index // engines for index in range(engines + 1)]
    return [Share(cores=frozenset(cores[a:b])) for a, b in pairwise(edges)]


def machine_shares(engines: int, gpus_each: int) -> list[Share]:
    """The same of this machine, as far as this process may use it."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    gpus = named[:count] if named else [str(index) for index in range(count)]
    return shares(engines, gpus_each, gpus, sorted(os.sched_getaffinity(0)))


class _Sender:
    """A Reporter that tells another process."""

    def __init__(self, events: Connection) -> None:
        self._events = events

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self._events.send((name, arguments))


class _Asker:
    """A source of shards that asks another process for them."""

    def __init__(self, events: Connection) -> None:
        self._events = events

    def begin(self, number: int) -> Pass | None:
        self._events.send((_BEGIN, number))
        return cast(Pass | None, self._events.recv())

    def take(self, number: int) -> Shard | None:
        self._events.send((_TAKE, number))
        return cast(Shard | None, self._events.recv())


def capture_side_by_side(job: CaptureJob, passes: Passes, report: Reporter, verbose: bool) -> list[Run]:
    """Capture the shards of `passes` in `--data-parallel` processes.

    Returns:
        what each process captured.

    Raises:
        EngineError: a process died, or failed without one of our own errors; what it said is on stderr.
        DistilyError: what the first process that failed raised.
    """
    request = job.request
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[Share, Any]] = {}
    for share in machine_shares(request.data_parallel, request.tensor_parallel_size):
        events, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(job, share, theirs, verbose), name=f"capture on {share}"
        )
        with _environment(share):
            process.start()
        theirs.close()
        running[events] = share, process
    try:
        return _listen(running, passes, report)
    finally:
        for events in running:  # none, unless the data set cannot be read on: then they end, too
            events.close()


def _listen(running: dict[Connection, tuple[Share, Any]], passes: Passes, report: Reporter) -> list[Run]:
    """Pass on what the processes tell, and give them shards, until they have ended."""
    runs: list[Run] = []
    failures: list[DistilyError] = []
    progress = _Progress(report)
    while running:
        for events in cast(list[Connection], wait(list(running))):
            share, process = running[events]
            try:
                name, arguments = events.recv()
            except (EOFError, OSError):  # it has ended, perhaps in the middle of what it told
                del running[events]
                process.join()
                if process.exitcode:
                    failures.append(EngineError(f"the engine on {share} ended with code {process.exitcode}"))
                continue
            if name in (_BEGIN, _TAKE):
                answer = passes.begin(arguments) if name == _BEGIN else passes.take(arguments)
                with suppress(OSError):  # it has ended since
                    events.send(answer)
            elif name == _DONE:
                runs.append(arguments)
            elif name == _FAILED:
                failures.append(arguments)
                report.stage(f"the engine on {share} failed: {arguments}")
            else:
                progress.heard(share, name, arguments)
    if failures:
        raise failures[0]
    return runs


class _Progress:
    """Shows what several processes tell as that of one."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._kept: int | None = None
        self._total: int | None = None

    def heard(self, share: Share, name: str, arguments: tuple[Any, ...]) -> None:
        """A call of a Reporter's method in the process that has this share."""
        if name == "start":
            if self._kept is None:
                self._kept, self._total = arguments
                self._report.start(*arguments)
            return
        if name == "stage":
            arguments = (f"{share}: {arguments[0]}",)
        getattr(self._report, name)(*arguments)
        if name == "committed":
            self._kept = (self._kept or 0) + arguments[0]
            advise_of(self._kept, self._total)


@contextmanager
def _environment(share: Share) -> Iterator[None]:
    """What a process that starts meanwhile inherits: torch looks at it when it is imported."""
    before = os.environ.get(_VISIBLE)
    if share.gpus:
        os.environ[_VISIBLE] = share.gpus
    try:
        yield
    finally:
        if share.gpus:
            os.environ.pop(_VISIBLE)
            if before is not None:
                os.environ[_VISIBLE] = before


def _work(job: CaptureJob, share: Share, events: Connection, verbose: bool) -> None:
    """One of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that started it ends it
    if share.cores:
        os.sched_setaffinity(0, share.cores)
    quiet_libraries(not verbose)
    show_on_stderr("distily-cache")
    try:
        store = create_store(job.request.out, job.identity)
        report = cast(Reporter, _Sender(events))
        events.send((_DONE, capture_here(job, store, _Asker(events), report, verbose)))
    except DistilyError as error:
        events.send((_FAILED, error))
    except EOFError:
        pass  # the command has ended, and says why
