"""The order of an epoch: a permutation in windows, the same wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.order import epoch_order

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
