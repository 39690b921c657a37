"""Charts and their axes: what is drawn, what is left out, what a reader can tell apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from distily.html.axis import Axis, log_ticks, nice_ticks
from distily.html.chart import Bar, Series, bar_chart, histogram, line_chart, scatter
from distily.html.style import BAR, HEAT, INK, PALETTE, PAPER
from tests.html import parsed

SPANS = [(0.0, 1.0), (3.2, 3.2), (0.0, 0.0), (-5.0, 12.0), (1e-9, 2e-9), (1e20, 1e20), (-1e150, 1e150)]


@pytest.mark.parametrize(("low", "high"), SPANS)
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert all(one < other for one, other in pairwise(ticks))
    assert ticks[0] <= low + 1e-12 * abs(low)
    assert ticks[-1] >= high - 1e-12 * abs(high)
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (13.9, 5e6, [10.0**p for p in range(1, 8)]),
        (10.0, 10.0, [10.0, 20.0]),
        (12.0, 40.0, [10.0, 20.0, 50.0]),
        (0.5, 100.0, [10.0**p for p in range(-1, 3)]),
    ],
)
def test_ticks_of_a_logarithmic_axis_enclose_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_a_huge_logarithmic_range_has_few_ticks() -> None:
    ticks = log_ticks(1e-140, 1e140)
    assert len(ticks) <= 7
    assert ticks[0] <= 1e-140
    assert ticks[-1] >= 1e140


def test_a_logarithmic_axis_spaces_decades_evenly() -> None:
    axis = Axis.around([1.0, 1000.0], log=True).between(0, 300)
    assert [axis.place(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])


def test_a_point_lies_where_the_axes_say() -> None:
    figure = line_chart("t", [Series("a", [(0, 0.0), (5, 1.0), (10, 2.0)])], "step", "y")
    points = re.search(r'points="([^"]+)"', figure)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in points.group(1).split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2  # upwards


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    points = [(0, math.nan), (1, math.inf), (2, -1.0), (3, 0.0), (4, 7.0), (5, 1e300)]
    figure = line_chart("t", [Series("a", points)], "step", "y", log=True)
    assert "polyline" not in figure  # one point is left
    assert figure.count('class="mark"') == 1
    assert "nan" not in figure
    assert "legend" not in figure


def test_a_series_keeps_its_looks_and_its_name_where_others_have_no_points() -> None:
    lines = [Series("a", [(0, math.nan)]), Series("b", [(0, 1), (1, 2)])]
    figure = line_chart("t", lines, "step", "y")
    both = line_chart("t", [Series("a", [(0, 1)]), lines[1]], "step", "y")
    assert parsed(figure).texts["li"] == ["b"]
    (key,) = re.findall(r'<li class="(c\d)">.*?class="mark" d="([^"]+)"', figure)
    assert key == re.findall(r'<li class="(c\d)">.*?class="mark" d="([^"]+)"', both)[1]


@pytest.mark.parametrize("series", [[], [Series("a", [])], [Series("a", [(0, math.nan)])]])
def test_no_points_no_figure(series: list[Series]) -> None:
    assert line_chart("t", series, "x", "y") == ""
    assert histogram("t", [0, 1, 2], [0, 0], "x", "y") == ""
    assert bar_chart("t", [Bar("a", math.nan, "?")]) == ""
    assert scatter("t", [], "x", "y") == ""


@pytest.mark.parametrize("low", [1e-140, 1e-9, 1.0, 1e140])
def test_every_coordinate_is_inside_the_picture(low: float) -> None:
    points = [(0, low), (3, low * 7), (1e9, low * 1e5)]
    for log in (False, True):
        figure = line_chart("t", [Series("a", points)], "step", "y", log=log)
        places = re.findall(r'(?:x|y)="([-\d.]+)"', figure) + re.split(
            "[ ,]", re.findall(r'points="([^"]+)"', figure)[0]
        )
        assert all(0 <= float(place) <= 380 for place in places)


def test_series_differ_in_more_than_colour() -> None:
    lines = [Series(f"run {i}", [(0, i), (1, i + 1)]) for i in range(12)]
    figure = line_chart("t", lines, "step", "y")
    keys = re.findall(r'<li class="(c\d)"><svg.*?class="mark" d="([^"]+)"', figure)
    assert len(set(keys)) == 12  # no two have both in common
    assert len({shape for _, shape in keys[:7]}) == 7


def test_a_chart_says_what_it_shows() -> None:
    page = parsed(line_chart("Loss", [Series("a", [(0, 2.0), (90, 1.5)])], "step", "nats"))
    assert "Loss: nats by step" in page.texts["title"]
    assert "At the end a: 1.5 at 90." in page.texts["desc"]


def test_a_histogram_has_the_area_of_its_counts() -> None:
    figure = histogram("t", [0, 1, 2, 4], [10, 0, 20], "x", "y")
    heights = [float(h) for h in re.findall(r'<rect.*?height="([\d.]+)"', figure)]
    widths = [float(w) for w in re.findall(r'<rect.*?width="([\d.]+)"', figure)]
    assert heights[1] == 0
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.2)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)


def test_names_are_escaped() -> None:
    evil = '</svg><script>alert("1")</script>'
    for figure in (
        line_chart(evil, [Series(evil, [(0, 1)]), Series(evil, [(0, 2)])], evil, evil),
        histogram(evil, [0, 1], [1], evil, evil),
        bar_chart(evil, [Bar(evil, 1.0, evil)], evil),
    ):
        assert "script" not in parsed(figure).tags


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_and_text_is_legible(scheme: int) -> None:
    for pair in PALETTE:
        assert _contrast(pair[scheme], PAPER[scheme]) >= 3, pair[scheme]
    for pair in (*HEAT, BAR, PAPER):
        assert _contrast(INK[scheme], pair[scheme]) >= 4.5, pair[scheme]


def _contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2.2 defines it: 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
