"""sweep.html: one self-contained page about a sweep. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from distily.html.chart import Bar, Series, bar_chart, line_chart, scatter
from distily.html.page import Html, cards, code, note, paragraph, row, section, table
from distily.html.page import page as document
from student.sweep.results import Row, cells, columns, savings
from student.sweep.spec import SEED, SweepSpec

MAX_SERIES = 7  # as many as a chart has shapes for
SPREAD = 20  # a flag whose values lie this far apart, as a ratio, has a logarithmic axis


def page(rows: Sequence[Row], spec: SweepSpec, store: str) -> str:
    """The whole document; rows: the best first."""
    done = [one for one in rows if one.state == "finished" and _value(one, spec) is not None]
    return document(
        "Sweep",
        paragraph(f"Trainings from {store}, the best first by {spec.metric}."),
        _figures(rows, done, spec),
        paragraph(savings(rows) or ""),
        section("Runs", table(columns(spec), [cells(one, spec) for one in rows], sortable=True)),
        section("What each setting did", row(*(_by_axis(axis, done, spec) for axis in _varied(done, spec)))),
        section("Time", row(_by_time(done, spec))),
        section("Failures", *(_failure(one) for one in rows if one.reason)),
        note(
            "seconds: of the run's process; of one that was resumed, of its last process. saved: seconds to "
            "generate the teacher's numbers for the run's tokens anew, without those of later epochs, at the "
            "pace at which the cache was generated."
        ),
    )


def _figures(rows: Sequence[Row], done: Sequence[Row], spec: SweepSpec) -> Html:
    states = [one.state for one in rows]
    return cards(
        [
            ("runs", len(rows)),
            ("finished", states.count("finished")),
            ("failed", states.count("failed") or None),
            (f"best {spec.metric}", _value(done[0], spec) if done else None),
        ]
    )


def _failure(one: Row) -> Html:
    return Html(paragraph(one.run.name) + code(one.reason or ""))


def _varied(done: Sequence[Row], spec: SweepSpec) -> list[str]:
    return [axis for axis in spec.axes if len({one.run.settings.get(axis) for one in done}) > 1]


def _by_axis(axis: str, done: Sequence[Row], spec: SweepSpec) -> Html:
    """Numbers: a line for each setting of everything else, the mean of its seeds. Words: the best of each."""
    title = f"{spec.metric} by {axis}"
    numbers = {one.run.settings[axis]: _float(one.run.settings[axis]) for one in done}
    if axis == SEED or any(value is None for value in numbers.values()):
        best = {one.run.settings[axis]: one for one in reversed(done)}  # the best come first
        bars = [
            Bar(name, value, f"{value:.4g}") for name, one in best.items() if (value := _value(one, spec))
        ]
        return bar_chart(title, sorted(bars, key=lambda bar: bar.label), "The best run of each.")
    lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in done:
        rest = {name: text for name, text in one.run.settings.items() if name not in (axis, SEED)}
        x, y = numbers[one.run.settings[axis]], _value(one, spec)
        assert x is not None and y is not None
        lines[", ".join(f"{name} {text}" for name, text in rest.items()) or "all runs"][x].append(y)
    log_x = _far(value for value in numbers.values() if value is not None)
    if len(lines) > MAX_SERIES:  # too many to tell apart
        points = sorted((x, y) for line in lines.values() for x, ys in line.items() for y in ys)
        return line_chart(title, [Series("runs", points, joined=False)], axis, spec.metric, log_x=log_x)
    series = [
        Series(name, sorted((x, sum(ys) / len(ys)) for x, ys in line.items())) for name, line in lines.items()
    ]
    return line_chart(title, series, axis, spec.metric, log_x=log_x)


def _by_time(done: Sequence[Row], spec: SweepSpec) -> Html:
    title, named = f"{spec.metric} by seconds", []
    for one in done:
        value = _value(one, spec)
        if one.seconds is not None and value is not None:
            named.append((", ".join(one.run.settings.values()), one.seconds, value))
    if len(named) > MAX_SERIES:
        points = [(x, y) for _, x, y in named]
        return line_chart(title, [Series("runs", points, joined=False)], "seconds", spec.metric)
    return scatter(title, named, "seconds", spec.metric)


def _value(one: Row, spec: SweepSpec) -> float | None:
    value = one.metrics.get(spec.metric)
    return value if value is not None and math.isfinite(value) else None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _far(values: Iterable[float]) -> bool:
    known = list(values)
    return min(known) > 0 and max(known) / min(known) >= SPREAD
