"""Axes of the report's charts."""

from __future__ import annotations

import re

import pytest

from student.chart import Line, decades, line_chart, nice_ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 3.2), (-5.0, 12.0), (1e-9, 2e-9)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks == sorted(ticks)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(13.9, 5e6, [10.0**p for p in range(1, 8)]), (10.0, 10.0, [10.0, 100.0])]
)
def test_decades_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert decades(low, high) == pytest.approx(expected)


def test_a_logarithmic_axis_spaces_decades_evenly() -> None:
    svg = line_chart([Line("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], "step", "perplexity", log=True)
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    heights = [float(pair.split(",")[1]) for pair in points.group(1).split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
