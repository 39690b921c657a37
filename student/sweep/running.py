"""Runs as processes, several at once, until there are no more."""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import Protocol

from distily.text import one_line
from student.sweep import capacity
from student.sweep.capacity import Machine, PeakMemory
from student.sweep.home import Home
from student.sweep.planning import arguments
from student.sweep.runs import SweepRun
from student.sweep.worker import RunJob, work

_EXCEPTION = re.compile(r"(distily-train|[A-Za-z_.]*(Error|Exception|Interrupt|Exit)): ")


class RunSource(Protocol):
    """Where runs come from. runs: all that are known."""

    @property
    def runs(self) -> list[SweepRun]: ...

    def next(self) -> SweepRun | None:
        """A run to do now; None while, or when, there is none."""

    def ended(self, run: SweepRun, failure: str | None) -> None:
        """A run that `next` gave has ended, well or with a failure in words."""


@dataclass
class Listed:
    """The runs of a list, in order."""

    runs: list[SweepRun]

    def __post_init__(self) -> None:
        self._left = deque(self.runs)

    def next(self) -> SweepRun | None:
        return self._left.popleft() if self._left else None

    def ended(self, run: SweepRun, failure: str | None) -> None:
        pass


@dataclass
class Pool:
    """Runs on the same caches, `jobs` at once or as many as fit. needed: what a finished run took."""

    home: Home
    stores: tuple[str, ...]
    manifest: str
    machine: Machine
    jobs: int | None
    needed: Callable[[SweepRun], PeakMemory]
    seen: list[PeakMemory] = field(default_factory=list)

    def run(self, source: RunSource, changed: Callable[[SweepRun, str, str | None], None]) -> None:
        """All runs of a source, but for those that are finished. changed: told of each run's new state,
        `running`, `finished` or `failed`, with the reason.

        An exception, as Ctrl-C, ends the processes; checkpoints and finished runs stay.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["student.sweep.worker"])
        running: dict[ForkServerProcess, SweepRun] = {}
        gpus: dict[ForkServerProcess, int] = {}
        try:
            while True:
                while len(running) < self._slots() and (run := source.next()) is not None:
                    if self.home.finished(run) is not None:
                        self._end(run, None, source, changed)
                        continue
                    gpu = self._gpu(Counter(gpus[process] for process in running if process in gpus))
                    process = context.Process(target=work, args=(self._job(run, gpu),))
                    process.start()
                    running[process] = run
                    if gpu is not None:
                        gpus[process] = gpu
                    changed(run, "running", None)
                if not running:
                    return
                wait([process.sentinel for process in running])
                for process in [one for one in running if not one.is_alive()]:
                    process.join()
                    run = running.pop(process)
                    self._end(run, self._failure(run, process.exitcode), source, changed)
        finally:
            for process in running:
                process.kill()
                process.join()

    def _slots(self) -> int:
        return self.jobs or capacity.at_once(self.machine, self.seen)

    def _gpu(self, busy: Counter[int]) -> int | None:
        """The GPU with the fewest runs."""
        return min(range(len(self.machine.gpus)), key=lambda gpu: busy[gpu], default=None)

    def _job(self, run: SweepRun, gpu: int | None) -> RunJob:
        directory, resume = self.home.directory(run), self.home.checkpointed(run)
        directory.mkdir(parents=True, exist_ok=True)
        self.home.log(run).parent.mkdir(exist_ok=True)
        words = arguments(run, self.stores, self.manifest, directory, resume)
        threads = max(1, self.machine.cores // self._slots())
        visible = None if gpu is None else capacity.visible(gpu)
        return RunJob(
            words=words,
            directory=directory,
            log=self.home.log(run),
            threads=threads,
            gpu=visible,
            resumed=resume,
        )

    def _end(
        self,
        run: SweepRun,
        failure: str | None,
        source: RunSource,
        changed: Callable[[SweepRun, str, str | None], None],
    ) -> None:
        if failure is None:
            self.seen.append(self.needed(run))
        source.ended(run, failure)
        changed(run, "failed" if failure else "finished", failure)

    def _failure(self, run: SweepRun, code: int | None) -> str | None:
        """Why a process ended, in a line; None where it ended well."""
        if code == 0:
            return None
        if code is not None and code < 0:
            return f"killed by signal {-code}" + ", as when memory runs out" * (code == -9)
        log = self.home.log(run).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in log.rpartition("\n--- ")[2].split("\n") if line.strip()]
        named = [line for line in said if _EXCEPTION.match(line)]  # its message may go on for many lines
        return one_line((named or said)[-1].removeprefix("distily-train: "), None)
