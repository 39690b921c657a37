"""An axis of a chart: round marks, and where a value stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps low..high to the pixels start..end, by the logarithm when `log`; ticks: the values to mark."""

    ticks: Sequence[float]
    low: float
    high: float
    log: bool
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def around(
        cls, values: Sequence[float], log: bool, tight: bool = False, ticks: Sequence[float] | None = None
    ) -> Axis:
        """An axis that holds `values` (finite, positive when `log`).

        It ends at round marks, or when `tight` at the values themselves, with the marks between them.
        """
        low, high = min(values), max(values)
        marks = list(ticks or (log_ticks(low, high) if log else nice_ticks(low, high)))
        if tight and low < high:
            inside = [tick for tick in marks if low <= tick <= high]
            return cls(ticks=inside or [low, high], low=low, high=high, log=log)
        return cls(ticks=marks, low=min(marks[0], low), high=max(marks[-1], high), log=log)

    def between(self, start: float, end: float) -> Axis:
        """The same axis on other pixels."""
        return replace(self, start=start, end=end)

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose low..high."""
    if high - low < 1e-12 * max(abs(low), abs(high)) or high == low:
        margin = abs(high) / 2 or 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round numbers that enclose low..high, both positive: of 1, 2, 5, 10, … or of powers of ten."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    if last - first > 2:
        stride = -(-(last - first) // (count - 1))
        return [10.0**power for power in range(first, last + stride, stride)]
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    # The last one at or below `low` to the first one at or above `high`.
    below = max(index for index, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    above = next((index for index, mark in enumerate(marks) if mark >= high * (1 - 1e-9)), len(marks) - 1)
    return marks[below : max(above, below + 1) + 1]
