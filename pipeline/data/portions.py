"""A data set in portions: consecutive documents, of which samples are made on their own, in any process.

Nothing is carried from one portion to the next, so that what is in memory does not depend on the size of the
data set, and a portion gives the same samples wherever and whenever it is cut.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

# Characters of a portion: about 2M tokens, which is some tens of shards.
PORTION_SIZE = 8 * 2**20
# What a document counts with beside its characters, so that empty ones end, too.
_OF_A_DOCUMENT = 64


@dataclass(frozen=True)
class Portion:
    """Documents as `Documents.values` gives them; whether they are the last ones."""

    values: list[tuple[str, Any]]
    last: bool


def portions(values: Iterable[tuple[str, Any]], size: int) -> Generator[Portion]:
    """The documents in order, in portions that end as soon as they have `size` characters; one at least."""
    portion: list[tuple[str, Any]] = []
    filled = 0
    for where, value in values:
        if filled >= size:
            yield Portion(portion, last=False)
            portion, filled = [], 0
        portion.append((where, value))
        filled += _characters(value) + _OF_A_DOCUMENT
    yield Portion(portion, last=True)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
