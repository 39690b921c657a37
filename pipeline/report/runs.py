"""Where a store's numbers come from: the commands that made it, in order. A record may hold anything."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from distily.html.page import Html, code, note, section
from distily.safety.redaction import redact_words
from distily.units import duration


def number_in(record: Mapping[str, Any], name: str) -> float | None:
    """The finite number of that name, None where there is none."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def runs_section(records: Iterable[Mapping[str, Any]]) -> Html:
    """A command and what it did for each provenance record, oldest first."""
    parts = [part for record in records for part in (code(_command(record)), note(_done(record)))]
    return section("The commands that made it", *parts)


def _command(record: Mapping[str, Any]) -> str:
    argv = record.get("argv")
    if not isinstance(argv, list) or not argv:
        return str(record.get("command") or "unknown")
    # A store may have been made by a version that kept command lines as they were typed.
    words = redact_words([str(word) for word in argv])
    return shlex.join([PurePath(words[0]).name, *words[1:]])


def _done(record: Mapping[str, Any]) -> str:
    seconds, start = number_in(record, "capture_seconds"), number_in(record, "engine_seconds")
    tokens = number_in(record, "tokens")
    said = [str(record["began"])] if "began" in record else []
    if tokens is not None:
        rate = f" in {duration(seconds)}, {tokens / seconds:,.0f}/s" if seconds else ""
        said.append(f"{tokens:,.0f} tokens{rate}")
    if start:
        said.append(f"{duration(start)} until the engine was ready")
    writing = record.get("writing")
    if isinstance(writing, Mapping):
        said.append(f"{writing.get('texts', '?')} texts written by {writing.get('by', '?')}")
    for name in ("versions", "hardware"):
        found = record.get(name)
        if isinstance(found, Mapping):
            said.append(", ".join(f"{key} {_plain(value)}" for key, value in found.items() if value))
    return "; ".join(said) + "."


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
