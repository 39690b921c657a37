"""The teachers of a training from several caches, from its summary; nothing of one from one cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distily.html.page import Cell, Html, note, section, table
from distily.units import number
from student.report.files import RunFiles, number_in, rows_in


def stores(run: RunFiles) -> list[Mapping[str, Any]]:
    """What the summary says of each cache; empty where there was one."""
    return rows_in(run.summary, "stores")


def shares(run: RunFiles) -> str | None:
    """`0.5 a + 0.5 b`; None where there was one cache."""
    return " + ".join(f"{_weight(one)} {one.get('name')}" for one in stores(run)) or None


def manifests(run: RunFiles) -> str:
    """Of all caches that a run read, as one word."""
    found = [str(one.get("manifest")) for one in stores(run)]
    return "+".join(found or [str(run.summary.get("manifest"))])


def rows(run: RunFiles) -> list[tuple[str, ...]]:
    """Under HEADER, a line for each cache."""
    return [
        (
            str(one.get("name", "–")),
            _weight(one),
            _word(one.get("teacher"), "name"),
            _word(one.get("teacher"), "digest")[:12],
            str(one.get("manifest", "–")),
            number(number_in(one, "samples")),
        )
        for one in stores(run)
    ]


HEADER = ("cache", "weight", "teacher", "teacher's digest", "manifest", "samples")


def matched(run: RunFiles) -> str:
    """How many samples were used and what held-out metrics compare with, in sentences."""
    count, against = run.number("matched_samples"), run.summary.get("held_out_against")
    said = f"{number(count)} samples are in all of the caches, and only these were used. "
    return said + (f"{against[:1].upper()}{against[1:]}." if isinstance(against, str) else "")


def teachers_section(run: RunFiles) -> Html:
    """The caches of a run and their teachers."""
    if not stores(run):
        return Html("")
    lines: list[tuple[Cell, ...]] = list(rows(run))
    return section("Teachers", table(HEADER, lines), note(matched(run)))


def _weight(store: Mapping[str, Any]) -> str:
    """Of a teacher; `1→0 (linear, until 0.5)` where it moved, as it was asked for."""
    course = store.get("schedule")
    if not isinstance(course, Mapping):
        return number(number_in(store, "weight") if course is None else number_in(store, "schedule"))
    first, last, until = (number(number_in(course, name)) for name in ("from", "to", "until"))
    return f"{first}→{last} ({course.get('schedule')}, until {until})"


def _word(found: Any, name: str) -> str:
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) else "–"
