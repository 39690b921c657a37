"""Weights of terms: a number, or a schedule over the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Weight:
    """Goes from `start` to `end` while progress goes from 0 to `until` (a fraction of all training steps),
    and stays there.

    schedule: "constant" (start and end are equal), "linear", or "cosine" (half a wave, flat at both ends).
    """

    start: float
    end: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    until: float = 1.0

    @classmethod
    def constant(cls, value: float) -> Weight:
        """The same weight throughout."""
        return cls(float(value), float(value))

    def at(self, progress: float) -> float:
        """The weight when `progress`, steps done / all steps, is in [0, 1]."""
        share = min(progress / self.until, 1.0)
        if self.schedule == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return self.start + share * (self.end - self.start)

    def scaled(self, factor: float) -> Weight:
        """The same course, `factor` times as high."""
        return Weight(self.start * factor, self.end * factor, self.schedule, self.until)

    def to_json(self) -> float | dict[str, Any]:
        """A number where it is constant, else an object as in an objective's file."""
        if self.schedule == "constant":
            return self.start
        return {"schedule": self.schedule, "from": self.start, "to": self.end, "until": self.until}

    def __str__(self) -> str:
        if self.schedule == "constant":
            return f"{self.start:g}"
        return f"{self.start:g}→{self.end:g}"
