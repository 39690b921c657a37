"""Charts for distily.html.page, as inline SVG in the page's colours.

A chart is 380 units wide, so that its text is legible both on a phone and in a third of a desk's screen.
Every series has a colour and a shape of its own, so nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from distily.html.axis import Axis
from distily.html.page import Html, html
from distily.html.style import PALETTE
from distily.units import short

_WIDTH, _HEIGHT = 380, 240
_TOP, _BOTTOM = 28, 40
_LETTER = 8.3  # width of a digit at the charts' font size
_MARKS = 7  # shapes drawn along one line at most
_HOVERS = 100  # points of one series that tell their values to a pointer, at most
# Round (0, 0): circle, square, triangle, diamond, upside-down triangle, plus, bar.
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.7-3.7h7.4v7.4h-7.4z",
    "M0-5 4.8 3.6h-9.6z",
    "M0-5.4 5.4 0 0 5.4-5.4 0z",
    "M0 5 4.8-3.6h-9.6z",
    "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "M-2-5.2h4v10.4h-4z",
)


@dataclass(frozen=True)
class Series:
    """Points (x, y) in drawing order; dashed marks a reference, without joined they are only dots."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    joined: bool = True


def line_chart(
    title: str, series: Iterable[Series], x_label: str, y_label: str, log: bool = False, log_x: bool = False
) -> Html:
    """A figure with a line for each series; nothing when no point can be drawn.

    `log` makes the y axis logarithmic, `log_x` the x axis. Points that are not finite, or not positive on a
    logarithmic axis, are left out; so is a series without points. A legend names the series where
    more than one was given.
    """
    given = [replace(one, points=[p for p in one.points if _drawable(p, log_x, log)]) for one in series]
    # A series looks the same in every chart of the same list, whichever others have no points there.
    kept = [(index, one) for index, one in enumerate(given) if one.points]
    if not kept:
        return Html("")
    xs, ys = zip(*(point for one in given for point in one.points), strict=True)
    tight = all(one.joined for _, one in kept)  # dots keep away from the edges
    x_axis, y_axis = _axes(Axis.around(xs, log_x, tight), Axis.around(ys, log))
    drawn = "".join(_drawn(index, one, x_axis, y_axis) for index, one in kept)
    body = _grid(x_axis, y_axis, x_label, y_label) + drawn
    ends = "; ".join(
        f"{one.name}: {short(one.points[-1][1])} at {short(one.points[-1][0])}" for _, one in kept
    )
    legend = "".join(_key(index, one) for index, one in kept)
    keys = f'<ul class="legend">{legend}</ul>' if len(given) > 1 else ""
    return _figure(title, _svg(f"{title}: {y_label} by {x_label}", f"At the end {ends}.", body) + keys)


def scatter(
    title: str,
    points: Iterable[tuple[str, float, float]],
    x_label: str,
    y_label: str,
    log: bool = False,
    log_x: bool = False,
) -> Html:
    """A figure with a dot for each (name, x, y) and a legend."""
    dots = [Series(name, [(x, y)], joined=False) for name, x, y in points]
    return line_chart(title=title, series=dots, x_label=x_label, y_label=y_label, log=log, log_x=log_x)


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[float],
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Html:
    """A figure with a column for each of `counts`, from edge to edge; nothing when all are zero.

    `edges`: one more than counts, ascending, positive with `log_x`.
    """
    if not any(counts):
        return Html("")
    ticks = [edges[i] for i in range(0, len(edges), -(-len(edges) // 7))] if log_x else None
    x_axis, y_axis = _axes(
        Axis.around(edges, log_x, tight=True, ticks=ticks), Axis.around([0, *counts], False)
    )
    bottom = y_axis.place(0)
    columns = []
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        left, right, top = x_axis.place(low), x_axis.place(high), y_axis.place(count)
        columns.append(
            f'<rect class="mark c0" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{bottom - top:.1f}"><title>{short(low)} to {short(high)}: {short(count)}</title></rect>'
        )
    most = max(range(len(counts)), key=counts.__getitem__)
    desc = f"Most between {short(edges[most])} and {short(edges[most + 1])}: {short(counts[most])}."
    body = _grid(x_axis, y_axis, x_label, y_label) + "".join(columns)
    return _figure(title, _svg(f"{title}: {y_label} by {x_label}", desc, body))


@dataclass(frozen=True)
class Bar:
    """text: the value as it is written beside the bar."""

    label: str
    value: float
    text: str


def bar_chart(title: str, bars: Iterable[Bar], remark: str = "") -> Html:
    """A figure with a bar across for each value, the longest across the figure; nothing without bars."""
    kept = [bar for bar in bars if math.isfinite(bar.value)]
    if not kept:
        return Html("")
    most = max(0.0, *(bar.value for bar in kept)) or 1.0
    items = "".join(
        f"<li><span>{html(bar.label)}</span><span>{html(bar.text)}</span>"
        f'<i class="c0" style="width:{100 * max(bar.value, 0) / most:.1f}%"></i></li>'
        for bar in kept
    )
    return _figure(title, f'<ul class="bars">{items}</ul>', remark)


def _figure(title: str, body: str, remark: str = "") -> Html:
    below = f'<p class="note">{html(remark)}</p>' if remark else ""
    return Html(f"<figure><figcaption>{html(title)}</figcaption>{body}{below}</figure>")


def _svg(title: str, desc: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{html(title)}</title>'
        f"<desc>{html(desc)}</desc>{body}</svg>"
    )


def _drawable(point: tuple[float, float], log_x: bool, log_y: bool) -> bool:
    """Also in the sense that spans of such numbers do not overflow."""
    return all(
        abs(value) < 1e150 and (value > 1e-150 or not log)
        for value, log in zip(point, (log_x, log_y), strict=True)
    )


def _axes(x_axis: Axis, y_axis: Axis) -> tuple[Axis, Axis]:
    """The axes with their pixels: room on the left for the longest mark, on the right for half the last."""
    left = 8 + _LETTER * max(len(short(tick)) for tick in y_axis.ticks)
    right = _WIDTH - max(10.0, _LETTER * len(short(x_axis.ticks[-1])) / 2 + 1)
    return x_axis.between(left, right), y_axis.between(_HEIGHT - _BOTTOM, _TOP)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    left, right, bottom = x_axis.start, x_axis.end, y_axis.start
    parts = [f'<text x="2" y="12">{html(y_label)}</text>']
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{short(tick)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{html(x_label)}</text>')
    return "".join(parts)


def _drawn(index: int, series: Series, x_axis: Axis, y_axis: Axis) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    parts = [f'<g class="{_colour(index)}"><title>{html(series.name)}</title>']
    if series.joined and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line{" dashed" if series.dashed else ""}" points="{path}"/>')
    if not series.dashed or len(places) == 1:
        step = -(-len(places) // _MARKS) if series.joined else 1
        # The marks of several lines stand at different points.
        for x, y in places[index % step :: step] or places[-1:]:
            parts.append(_mark(index, f' transform="translate({x:.1f} {y:.1f})"'))
    every = -(-len(places) // _HOVERS)
    shown = list(zip(series.points, places, strict=True))[::every]
    parts += [_hover(series.name, point, place) for point, place in shown]
    return "".join(parts) + "</g>"


def _hover(name: str, point: tuple[float, float], place: tuple[float, float]) -> str:
    """What shows a point's values to a pointer that rests on it."""
    said = html(f"{name}: {short(point[1])} at {short(point[0])}")
    return (
        f'<circle class="hover" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="6"><title>{said}</title></circle>'
    )


def _key(index: int, series: Series) -> str:
    style = "line dashed" if series.dashed else "line"
    line = f'<path class="{style}" d="M-12 0h24"/>' if series.joined else ""
    mark = "" if series.dashed and len(series.points) > 1 else _mark(index)
    return (
        f'<li class="{_colour(index)}"><svg viewBox="-12 -6 24 12" aria-hidden="true">{line}{mark}</svg>'
        f"{html(series.name)}</li>"
    )


def _mark(index: int, transform: str = "") -> str:
    return f'<path class="mark" d="{_SHAPES[index % len(_SHAPES)]}"{transform}/>'


def _colour(index: int) -> str:
    return f"c{index % len(PALETTE)}"
