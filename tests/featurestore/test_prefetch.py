"""Lookahead: every shard is warmed once, in the order of use, within bounds, and damage is left to the
reader.
"""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.errors import CorruptionError
from featurestore.order import epoch_order
from featurestore.prefetch import prefetched
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SPECS, Filled, Place


def settle(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.002)
    assert condition()  # type: ignore[operator]


def shards_of(sizes: list[int]) -> list[list[int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 9), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_order_is_kept_and_every_shard_is_warmed_once(sizes: list[int], seed: int, ahead: int) -> None:
    shards = shards_of(sizes)
    order = epoch_order("ab" * 16, seed, 0, shards, window=3).tolist()
    warmed: list[int] = []
    assert list(prefetched(order, shards, warmed.append, ahead)) == order
    # The thread stops with the iteration, so that the last ones may be missing.
    first = list(dict.fromkeys(next(n for n, s in enumerate(shards) if i in s) for i in order))
    found = [next(n for n, s in enumerate(shards) if i in s) for i in warmed]
    assert found == first[: len(found)]


def test_the_thread_stays_within_its_bound_and_ends() -> None:
    shards = shards_of([2] * 20)
    warmed: list[int] = []
    before = threading.active_count()
    reading = prefetched(range(40), shards, warmed.append, ahead=3)
    assert next(reading) == 0
    settle(lambda: len(warmed) == 4)
    time.sleep(0.05)
    assert warmed == [0, 2, 4, 6]
    assert [next(reading) for _ in range(4)] == [1, 2, 3, 4]
    settle(lambda: len(warmed) == 6)
    reading.close()  # type: ignore[attr-defined]
    settle(lambda: threading.active_count() == before)
    assert len(warmed) == 6


def test_damage_is_left_to_the_reader() -> None:
    def warm(index: int) -> None:
        raise CorruptionError("broken")

    assert list(prefetched(range(4), [[0, 1], [2, 3]], warm)) == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead", [1, 64])
def test_reads_find_what_was_warmed(filled_anywhere: Filled, place: Place, ahead: int) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    order = epoch_order(reader.manifest_digest, 0, 0, reader.shards()).tolist()
    names = []
    for index in prefetched(order, reader.shards(), lambda i: reader.warm(i, SPECS), ahead):
        names.append(reader.read(index, SPECS).id)
    assert sorted(names) == sorted(filled_anywhere.samples)
