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
from featurestore.order import EpochOrder
from featurestore.prefetch import prefetched
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SPECS, Filled, Place


def settle(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.002)
    assert condition()  # type: ignore[operator]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_order_is_kept_and_every_shard_is_warmed_once(
    samples: int, size: int, seed: int, ahead: int
) -> None:
    order = EpochOrder("ab" * 16, seed, 0, samples, 4, window=3)
    warmed: list[int] = []
    assert list(prefetched(order, lambda index: index // size, warmed.append, ahead)) == list(order)
    first = list(dict.fromkeys(index // size for index in order))
    found = [index // size for index in warmed]
    # The thread stops with the iteration, and passes over what was yielded before: some may be missing.
    assert len(set(found)) == len(found) and found == [shard for shard in first if shard in set(found)]


def test_the_thread_stays_within_its_bound_and_ends() -> None:
    warmed: list[int] = []
    before = threading.active_count()
    reading = prefetched(range(40), lambda index: index // 2, warmed.append, ahead=3)
    assert next(reading) == 0
    settle(lambda: len(warmed) == 4)
    time.sleep(0.05)
    assert warmed == [0, 2, 4, 6]
    assert [next(reading) for _ in range(4)] == [1, 2, 3, 4]
    settle(lambda: len(warmed) == 6)
    reading.close()  # type: ignore[attr-defined]
    settle(lambda: threading.active_count() == before)
    assert len(warmed) == 6


def test_steps_that_are_skipped_are_not_warmed() -> None:
    """As Trainer does when a run resumes: it takes the indices and does not read."""
    begun, go = threading.Event(), threading.Event()
    warmed: list[int] = []

    def warm(index: int) -> None:
        warmed.append(index)
        begun.set()
        go.wait(10)

    reading = prefetched(range(1000), lambda index: index, warm, ahead=3)
    assert next(reading) == 0 and begun.wait(10)
    for _ in range(900):
        next(reading)
    go.set()
    settle(lambda: len(warmed) > 2 and warmed[-1] == 903)
    assert [index for index in warmed if index < 899] == warmed[:1]


def test_damage_is_left_to_the_reader() -> None:
    def warm(index: int) -> None:
        raise CorruptionError("broken")

    assert list(prefetched(range(4), lambda index: index // 2, warm)) == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead", [1, 64])
def test_reads_find_what_was_warmed(filled_anywhere: Filled, place: Place, ahead: int) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    order = EpochOrder(reader.manifest_digest, 0, 0, len(reader), 3)
    names = []
    for index in prefetched(order, reader.shard, lambda i: reader.warm(i, SPECS), ahead):
        names.append(reader.read(index, SPECS).id)
    assert sorted(names) == sorted(filled_anywhere.samples)
