"""Line charts as inline SVG that follow the page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 40
_COLOURS = 5  # classes c0..c4 of the page's style


@dataclass(frozen=True)
class Line:
    """One line: (x, y) points in drawing order. dashed marks a reference."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, log: bool = False) -> str:
    """An <svg> with axes, a legend and one polyline per line; points that are not finite are left out.

    `log` makes the y axis logarithmic; all y must then be positive.
    """
    lines = [
        Line(line.name, [p for p in line.points if all(map(math.isfinite, p))], line.dashed) for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return "<p>No data.</p>"
    x_axis = _Axis.around([x for line in lines for x, _ in line.points], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.around([y for line in lines for _, y in line.points], _HEIGHT - _BOTTOM, _TOP, log)
    body = [*_grid(x_axis, y_axis, x_label, y_label)]
    for index, line in enumerate(lines):
        style = f"c{index % _COLOURS}" + (" dashed" if line.dashed else "")
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in line.points)
        body.append(f'<polyline class="{style}" points="{path}"/>')
        body.append(_legend(index, style, line.name))
    title = f"{y_label} by {x_label}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


@dataclass(frozen=True)
class _Axis:
    """Maps low..high to the pixels start..end, by the logarithm when `log`."""

    ticks: list[float]
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> _Axis:
        ticks = decades(min(values), max(values)) if log else nice_ticks(min(values), max(values))
        return cls(ticks, min(ticks[0], *values), max(ticks[-1], *values), start, end, log)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose low..high, both positive; at least two."""
    first = math.floor(math.log10(low))
    return [10.0**power for power in range(first, max(math.ceil(math.log10(high)), first + 1) + 1)]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose low..high."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 4}">{escape(y_label)}</text>')
    return parts


def _legend(index: int, style: str, name: str) -> str:
    x, y = _WIDTH - 190, _TOP + 8 + 16 * index
    return (
        f'<line class="{style}" x1="{x}" x2="{x + 20}" y1="{y}" y2="{y}"/>'
        f'<text x="{x + 26}" y="{y + 4}">{escape(name)}</text>'
    )
