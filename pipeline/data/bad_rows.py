"""Rows that cannot be used: counted, with the first few named, and refused or dropped at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RequestError

# So many are named in an error line.
_NAMED = 3


class RowError(RequestError):
    """One row cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Unusable:
    """What a data set has in the place of a value that cannot be read."""

    reason: str


@dataclass
class BadRows:
    """How many rows could not be used, and why the first of them could not."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.reasons) < _NAMED:
            self.reasons.append(reason)

    def usable(self, values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The values that could be read; the others are counted."""
        for where, value in values:
            if isinstance(value, Unusable):
                self.add(f"DATASET {where}: {value.reason}")
            else:
                yield where, value

    def __add__(self, other: BadRows) -> BadRows:
        """Both together, those of `self` first."""
        return BadRows(self.count + other.count, [*self.reasons, *other.reasons][:_NAMED])

    @property
    def first(self) -> str:
        """What is wrong with the first ones."""
        return "; ".join(self.reasons) + "; …" * (self.count > len(self.reasons))

    def refuse(self, dataset: str) -> None:
        """Raise RequestError if there was one."""
        if not self.count:
            return
        advice = "correct them, or give --bad-rows drop to leave them out"
        if self.count == 1:
            raise RequestError(f"{self.reasons[0]}; --bad-rows drop would leave this row out")
        raise RequestError(f"DATASET {dataset}: {self.count:,} rows cannot be used ({self.first}); {advice}")
