"""The order of an epoch: a permutation, the same for every number of readers and after every resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.errors import StoreFormatError
from featurestore.order import Position, epoch_order, rank_share

DIGEST = "ab" * 16
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def shards_of(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def test_the_order_is_stable_for_ever() -> None:
    """Runs are resumed with these numbers. If this fails, old checkpoints change their order."""
    assert epoch_order(DIGEST, 1, 2, shards_of([3, 2, 4]), window=2).tolist() == [7, 3, 5, 4, 8, 6, 2, 1, 0]


@given(sizes, st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 8))
@settings(deadline=None)
def test_an_epoch_is_a_permutation_in_windows(lengths: list[int], seed: int, epoch: int, window: int) -> None:
    shards = shards_of(lengths)
    order = epoch_order(DIGEST, seed, epoch, shards, window)
    assert sorted(order.tolist()) == list(range(sum(lengths)))
    np.testing.assert_array_equal(order, epoch_order(DIGEST, seed, epoch, shards, window))
    shard_of = np.repeat(np.arange(len(lengths)), lengths)[order]
    seen: set[int] = set()
    while len(shard_of):
        # The next window: whole shards that did not occur before, at most `window` of them.
        members = list(dict.fromkeys(shard_of.tolist()))[:window]
        length = sum(lengths[s] for s in members)
        assert set(shard_of[:length].tolist()) == set(members) and not seen & set(members)
        seen |= set(members)
        shard_of = shard_of[length:]


@given(sizes, st.data())
@settings(deadline=None)
def test_every_world_size_and_every_resume_reads_the_same_steps(
    lengths: list[int], data: st.DataObject
) -> None:
    order = epoch_order(DIGEST, 0, 0, shards_of(lengths))
    batch = data.draw(st.sampled_from([1, 2, 4, 6, 12]))
    worlds = [w for w in range(1, batch + 1) if batch % w == 0]
    steps = -(-len(order) // batch)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=3)))
    found: list[int] = []
    for start, stop in zip([0, *stops], [*stops, steps], strict=True):
        world = data.draw(st.sampled_from(worlds))
        position = Position.from_json(Position(DIGEST, 0, 0, start).to_json())
        shares = [rank_share(order, position, batch, rank, world).tolist() for rank in range(world)]
        for _ in range(start, stop):
            for share in shares:
                found += share[: batch // world]
                del share[: batch // world]
    assert found == order.tolist()


def test_epochs_seeds_and_manifests_differ() -> None:
    shards = shards_of([50] * 4)
    orders = {
        epoch_order(digest, seed, epoch, shards).tobytes()
        for digest in (DIGEST, "cd" * 16)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    with pytest.raises(ValueError, match="window"):
        epoch_order(DIGEST, 0, 0, shards, 0)


@pytest.mark.parametrize(("rank", "world"), [(0, 5), (2, 2), (-1, 2)])
def test_shares_that_cannot_be_are_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=str(world)):
        rank_share(np.arange(20), Position(DIGEST, 0), 8, rank, world)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"digest": "x", "seed": 0, "epoch": 0, "step": 0},
        {"digest": DIGEST, "seed": -1, "epoch": 0, "step": 0},
    ],
)
def test_broken_positions_are_refused(value: object) -> None:
    with pytest.raises(StoreFormatError):
        Position.from_json(value)
