"""The frame of the reports: well-formed, on its own, escaped, readable on a phone."""

from __future__ import annotations

import pytest

from distily.html.page import cards, code, facts, html, note, page, paragraph, row, section, table
from distily.units import duration, number, short, size
from tests import html as reading

EVIL = "<script>alert(1)</script> & \"quotes\" 'too'"


def test_every_part_escapes_what_it_is_given() -> None:
    parts = (
        paragraph(EVIL),
        note(EVIL),
        code(EVIL),
        cards([(EVIL, EVIL)]),
        row(table((EVIL, EVIL), [(EVIL, EVIL)], EVIL)),
        facts([(EVIL, EVIL)], EVIL),
    )
    found = reading.page(page(EVIL, section(EVIL, *parts)))
    assert found.texts["h1"] == found.texts["h2"] == [EVIL]
    assert found.texts["caption"] == [EVIL, EVIL]
    assert found.texts["pre"] == found.texts["b"] == [EVIL]


def test_a_part_without_contents_is_left_out() -> None:
    assert table(("a", "b"), []) == cards([("a", None)]) == facts([("a", None)], "b") == ""
    assert section("Empty", row(table(("a",), [])), cards([])) == ""


def test_tables_scroll_and_align_numbers() -> None:
    text = table(("run", "KL", "objective"), [("a", 0.123456, "kl"), ("b", None, "12 x"), ("c", 2_000, "x")])
    found = reading.parsed(text)
    assert found.attributes["class"][0] == "scroll"
    assert found.attributes["tabindex"] == ["0"]  # a keyboard can scroll it
    assert found.attributes["aria-label"] == ["run, KL, objective"]
    assert found.attributes["class"].count("n") == 4  # the heading KL and its three cells
    assert found.texts["td"] == ["0.1235", "kl", "–", "12 x", "2,000", "x"]


def test_what_is_html_is_not_escaped_again() -> None:
    assert html(html("a < b")) == "a &lt; b"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (12_345, "12,345"), (1234.5, "1,234"), (0.00001234, "1.234e-5")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2048, "2048"),
        (25_000, "25k"),
        (2.5e6, "2.5M"),
        (1e-5, "1e-5"),
        (1e13, "1e13"),
        (-3e9, "-3G"),
    ],
)
def test_marks(value: float, text: str) -> None:
    assert short(value) == text


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678)] == ["0 bytes", "999 bytes", "1.0 kB", "12.3 MB"]
    assert [duration(s) for s in (1.23, 90, 600, 10_000)] == ["1.2 s", "90 s", "10.0 min", "2.8 h"]
