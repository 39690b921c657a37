"""`distily-train sweep`: specification, plan, runs, results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distily.html.page import write as write_page
from distily.safety.console import SafeConsole
from distily.system.files import write_json
from student.errors import UserError
from student.sweep.capacity import this_machine
from student.sweep.home import Home
from student.sweep.page import page
from student.sweep.planning import manifest_of, plan
from student.sweep.results import Row, needed, ranked, report, row, savings, table
from student.sweep.running import Listed, Pool, RunSource
from student.sweep.runs import SweepRun
from student.sweep.search import Searched
from student.sweep.spec import SweepSpec, read

WIDTH = 160  # of the table where it goes to a file


@dataclass(frozen=True)
class SweepRequest:
    """stores: caches that all runs learn from. jobs: runs at once, None for as many as fit."""

    stores: tuple[str, ...]
    spec: Path
    out: Path
    jobs: int | None = None


@dataclass
class Sweep:
    """A sweep at work: keeps sweep.json and sweep.html up to date."""

    spec: SweepSpec
    stores: tuple[str, ...]
    manifest: str
    home: Home
    source: RunSource

    def __post_init__(self) -> None:
        self._states: dict[str, tuple[str, str | None]] = {}

    def rows(self) -> list[Row]:
        """A row for each run, the best first."""
        waiting = ("waiting", None)
        rows = [row(self.home, run, *self._states.get(run.key, waiting)) for run in self.source.runs]
        return ranked(rows, self.spec)

    def changed(self, run: SweepRun, state: str, reason: str | None) -> None:
        """Remembers and writes it."""
        self._states[run.key] = (state, reason)
        self.write()

    def stopped(self) -> None:
        """What was running is not any more."""
        self._states = {key: state for key, state in self._states.items() if state[0] != "running"}
        self.write()

    def write(self) -> None:
        """sweep.json, and the page of what it holds."""
        write_json(self.home.table, self.report())
        write_page(self.home.page, page(self.rows(), self.spec, " and ".join(self.stores)))

    def report(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return report(self.rows(), self.spec, self.stores, self.manifest)

    def show(self) -> None:
        """Print the table, what the cache spared, and where the page is."""
        rows, console = self.rows(), SafeConsole()
        console.width = console.width if console.is_terminal else WIDTH
        console.print(table(rows, self.spec))
        console.print(savings(rows) or "", self.home.page, sep="\n", highlight=False)

    def finished(self) -> int:
        """How many runs have ended, well or not."""
        return sum(state in ("finished", "failed") for state, _ in self._states.values())

    def running(self) -> list[str]:
        """Names of the runs at work."""
        return [run.name for run in self.source.runs if self._states.get(run.key, ("",))[0] == "running"]


def sweep(request: SweepRequest) -> Sweep:
    """Run what is missing of a sweep. UserError for what is wrong with any run, before the first starts."""
    if request.jobs is not None and request.jobs < 1:
        raise UserError(f"--jobs {request.jobs}: give 1 or more")
    spec, home = read(request.spec), Home(request.out)
    manifest = manifest_of(home, request.stores)
    listed = plan(spec, request.stores, manifest, home)
    with home.locked():
        source = _source(spec, manifest, home, listed)
        state = Sweep(spec, request.stores, manifest, home, source)
        state.write()
        machine, jobs = this_machine(), request.jobs
        try:
            _watch(
                Pool(
                    home=home,
                    stores=request.stores,
                    manifest=manifest,
                    machine=machine,
                    jobs=jobs,
                    needed=lambda run: needed(home, run),
                ),
                state,
            )
        finally:
            state.stopped()
    return state


def _source(spec: SweepSpec, manifest: str, home: Home, listed: list[SweepRun]) -> RunSource:
    if spec.search is None:
        return Listed(listed)
    return Searched(spec, manifest, home.study, lambda run: row(home, run, "", None).metrics.get(spec.metric))


def _watch(pool: Pool, state: Sweep) -> None:
    """Runs them with a line for each change on standard error, and a bar where that is a terminal."""
    console = SafeConsole(stderr=True)
    parts = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*parts, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=state.spec.size)

        def changed(run: SweepRun, now: str, reason: str | None) -> None:
            state.changed(run, now, reason)
            progress.update(task, completed=state.finished(), description=", ".join(state.running()))
            progress.console.print(f"{now} {run.name}" + (f": {reason}" if reason else ""), highlight=False)

        pool.run(state.source, changed)
