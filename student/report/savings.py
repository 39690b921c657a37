"""When the cache has paid for itself: the teacher's time that each student did not spend again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distily.html.chart import Bar, bar_chart
from distily.html.page import Cell, Html, facts, note, row, section
from distily.units import duration, number, size
from student.report.files import RunFiles, teacher_tokens
from student.report.teachers import manifests


@dataclass(frozen=True)
class Saving:
    """saved: seconds in the teacher that live distillation of this run takes at the capture's pace."""

    name: str
    saved: float


def savings(runs: Sequence[RunFiles]) -> list[Saving]:
    """Of the runs whose cache recorded its pace. Tokens trained on are counted, those of evaluations not."""
    found = []
    for run in runs:
        tokens = teacher_tokens(run.summary)
        pace = run.number("cache_cost", "capture_tokens_per_second")
        if tokens is not None and pace:
            found.append(Saving(run.name, tokens / pace))
    return found


def capture_seconds(runs: Sequence[RunFiles]) -> float:
    """Of all the caches that the runs read, each once."""
    caches = {manifests(run): run.number("cache_cost", "capture_seconds") for run in runs}
    return sum(seconds for seconds in caches.values() if seconds is not None)


def cost_section(runs: Sequence[RunFiles]) -> Html:
    """What the caches cost, and what the runs saved."""
    caches = {manifests(run): run for run in runs}
    tables = [facts(_cost(run), f"Cache of {_teacher(run)}") for run in caches.values()]
    return section("What the cache cost and saved", row(*tables, _break_even(runs)), _words(runs))


def _break_even(runs: Sequence[RunFiles]) -> Html:
    found, cost = savings(runs), capture_seconds(runs)
    if not found or not cost:
        return Html("")
    bars = [Bar("capture, once", cost, duration(cost))]
    bars += [Bar(f"saved by {one.name}", one.saved, duration(one.saved)) for one in found]
    return bar_chart("Time in the teacher", bars)


def _words(runs: Sequence[RunFiles]) -> Html:
    found, cost = savings(runs), capture_seconds(runs)
    total = sum(one.saved for one in found)
    if not total or not cost:
        return Html("")
    each = total / len(found)
    return note(
        "A live teacher computes the tokens of every step again. At the capture's pace that is "
        f"{duration(each)} for a student like these, so the cache has paid for itself after "
        f"{number(cost / each)} of them; the time saved so far is {total / cost:.0%} of what the cache cost. "
        "Evaluations, which need a live teacher too, are not counted."
    )


def _cost(run: RunFiles) -> list[tuple[str, Cell]]:
    seconds = run.number("cache_cost", "capture_seconds")
    count = run.number("cache_cost", "bytes")
    return [
        ("samples", run.number("cache_cost", "samples")),
        ("tokens", run.number("cache_cost", "tokens")),
        ("on disk", None if count is None else size(count)),
        ("bytes per token", run.number("cache_cost", "bytes_per_token")),
        *_groups(run),
        ("in the teacher", None if seconds is None else duration(seconds)),
        ("tokens per second", run.number("cache_cost", "capture_tokens_per_second")),
    ]


def _groups(run: RunFiles) -> list[tuple[str, Cell]]:
    cost = run.summary.get("cache_cost")
    groups = cost.get("groups") if isinstance(cost, dict) else None
    names = groups if isinstance(groups, dict) else {}
    return [
        (f"{name}, bytes per token", run.number("cache_cost", "groups", name, "bytes_per_token"))
        for name in names
    ]


def _teacher(run: RunFiles) -> str:
    cost = run.summary.get("cache_cost")
    return str(cost.get("teacher")) if isinstance(cost, dict) else "the teacher"
