"""What the runs of a sweep came to: rows for sweep.json, the table and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from distily.safety.redaction import for_record
from student.report.files import teacher_tokens
from student.sweep.capacity import PeakMemory
from student.sweep.home import Home, read_json
from student.sweep.runs import SweepRun
from student.sweep.spec import SweepSpec

SHOWN = ("eval_kl", "eval_perplexity", "eval_top1_agreement")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. state: waiting, running, finished or failed, with the reason. seconds: of its process, for one
    that was `resumed` the last. generation_seconds: see the function of that name.
    """

    run: SweepRun
    output_dir: str
    state: str
    reason: str | None
    seconds: float | None
    resumed: bool
    metrics: Mapping[str, float]
    tokens: int | None
    generation_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.run.name,
            "settings": dict(self.run.settings),
            "flags": for_record(dict(self.run.flags)),
            "state": self.state,
            "reason": self.reason,
            "output_dir": self.output_dir,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "tokens": self.tokens,
            "generation_seconds": self.generation_seconds,
            "metrics": dict(self.metrics),
        }


def row(home: Home, run: SweepRun, state: str, reason: str | None) -> Row:
    """The row of a run; its numbers once it is finished."""
    directory, record = home.directory(run), home.finished(run)
    summary = read_json(directory / "summary.json") if record else None
    if record is None or summary is None:
        return Row(
            run=run,
            output_dir=str(directory),
            state=state,
            reason=reason,
            seconds=None,
            resumed=False,
            metrics={},
            tokens=None,
            generation_seconds=None,
        )
    metrics = {name: value for name, value in summary["last_eval"].items() if name.startswith("eval_")}
    return Row(
        run=run,
        output_dir=str(directory),
        state="finished",
        reason=None,
        seconds=record["seconds"],
        resumed=record["resumed"],
        metrics=metrics,
        tokens=summary["tokens"],
        generation_seconds=generation_seconds(summary),
    )


def generation_seconds(summary: Mapping[str, Any]) -> float | None:
    """Seconds to generate anew what a run learned from: its tokens, those of later epochs not again, at the
    rate that the cache's generation recorded. None where it recorded none.
    """
    cost = summary["cache_cost"]
    rate = cost["capture_tokens_per_second"]
    return round(min(teacher_tokens(summary) or 0, cost["tokens"]) / rate, 1) if rate else None


def needed(home: Home, run: SweepRun) -> PeakMemory:
    """What a finished run took of the machine."""
    summary = read_json(home.directory(run) / "summary.json") or {}
    return PeakMemory(summary["peak_rss_bytes"], summary.get("peak_cuda_bytes"))


def ranked(rows: Iterable[Row], spec: SweepSpec) -> list[Row]:
    """The best first; those without a number last, in the order of the sweep."""
    sign = 1 if spec.direction == "minimize" else -1

    def place(row: Row) -> float:
        value = row.metrics.get(spec.metric, math.nan)
        return math.inf if math.isnan(value) else sign * value

    return sorted(rows, key=place)


def report(rows: Sequence[Row], spec: SweepSpec, stores: Sequence[str], manifest: str) -> dict[str, Any]:
    """The content of sweep.json; several caches are a list, their manifests have commas between."""
    return {
        "version": 1,
        "spec": for_record(spec.content),
        "store": stores[0] if len(stores) == 1 else list(stores),
        "manifest": manifest,
        "metric": spec.metric,
        "direction": spec.direction,
        "runs": [row.to_json() for row in rows],
    }


def columns(spec: SweepSpec) -> list[str]:
    """Header of the table: what was varied, the metric, others, times."""
    return ["run", *spec.axes, *measures(spec), "seconds", "saved, s"]


def measures(spec: SweepSpec) -> list[str]:
    """The metrics that are shown, that of the sweep first."""
    return [spec.metric, *(name for name in SHOWN if name != spec.metric)]


def cells(row: Row, spec: SweepSpec) -> list[str]:
    """A line of the table, under `columns`; a run that is not finished says so in place of its metric."""
    settings = [row.run.settings.get(axis, "") for axis in spec.axes]
    numbers = [_metric(row, name) for name in measures(spec)]
    if row.state != "finished":
        numbers[0] = row.state
    seconds = _number(row.seconds, 1) + " (resumed)" * row.resumed
    return [row.run.key, *settings, *numbers, seconds, _number(row.generation_seconds, 1)]


def table(rows: Iterable[Row], spec: SweepSpec) -> Table:
    """For the terminal."""
    shown = Table()
    first = 1 + len(spec.axes)
    for index, name in enumerate(columns(spec)):
        shown.add_column(Text(name), justify="right" if index >= first else "left", overflow="fold")
    for one in rows:
        shown.add_row(*map(Text, cells(one, spec)))
    return shown


def savings(rows: Iterable[Row]) -> str | None:
    """What the cache spared the sweep, in a sentence; None where generation recorded no time."""
    done = [one for one in rows if one.generation_seconds is not None and one.seconds is not None]
    if not done:
        return None
    saved = sum(one.generation_seconds or 0 for one in done)
    cost = sum(one.seconds or 0 for one in done)
    return (
        f"{len(done)} runs took {cost:,.0f} s and no teacher; generating the teacher's numbers for each of "
        f"them anew would have taken {saved:,.0f} s more"
    )


def _metric(row: Row, name: str) -> str:
    """With its standard error, where that is known."""
    value, error = row.metrics.get(name), row.metrics.get(f"{name}_se")
    return _number(value, 4) + ("" if value is None or error is None else f" ± {error:.2g}")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
