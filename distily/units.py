"""Numbers as people write them: counts, sizes, durations, marks of an axis."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """An int with separators, a float with four digits that count; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return _plain(f"{value:.4g}")


def short(value: float) -> str:
    """A mark of an axis: 2500, 25k, 10M, 0.02, 1e-5."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(scale, 1e4) <= abs(value) < 1e12:
            return f"{value / scale:.6g}{unit}"
    return _plain(f"{value:.6g}")


def size(count: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _plain(text: str) -> str:
    """1e-05 as 1e-5."""
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
