"""The order of an epoch: a permutation in windows, the same wherever it is computed, and from any step on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.order import EpochOrder

DIGEST = "ab" * 16


def test_the_order_is_stable_for_ever() -> None:
    """Runs are resumed with these numbers. If this fails, old checkpoints change their order: that needs
    another ORDER_VERSION.
    """
    assert list(EpochOrder(DIGEST, 1, 2, 9, 2, window=2)) == [1, 2, 0, 3, 7, 6, 8, 5, 4]
    assert EpochOrder(DIGEST, 1, 2, 64_000_000, 64)[31_234_567] == 32004958


@given(
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.data(),
)
@settings(deadline=None)
def test_an_epoch_is_a_permutation_in_windows(
    samples: int, block: int, window: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    order = EpochOrder(DIGEST, seed, epoch, samples, block, window)
    whole = list(order)
    assert sorted(whole) == list(range(samples)) and len(order) == samples
    step = data.draw(st.integers(0, samples))
    again = EpochOrder(DIGEST, seed, epoch, samples, block, window)
    assert list(again.starting(step)) == whole[step:]
    assert [again[at] for at in (0, samples // 2, -1)] == [whole[at] for at in (0, samples // 2, -1)]
    seen: set[int] = set()
    left = whole
    while left:
        # The next window: whole blocks that did not occur before, at most `window` of them.
        blocks = list(dict.fromkeys(index // block for index in left))[:window]
        length = sum(min(block, samples - number * block) for number in blocks)
        assert {index // block for index in left[:length]} == set(blocks) and not seen & set(blocks)
        seen |= set(blocks)
        left = left[length:]


def test_epochs_seeds_and_manifests_differ() -> None:
    orders = {
        tuple(EpochOrder(digest, seed, epoch, 200, 50))
        for digest in (DIGEST, "cd" * 16)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    for block, window in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="window"):
            EpochOrder(DIGEST, 0, 0, 10, block, window)


def test_each_block_comes_first_as_often() -> None:
    """Over many seeds; the bound is five standard deviations of a binomial."""
    runs, blocks = 3000, 5
    first = [EpochOrder(DIGEST, seed, 0, blocks, 1, window=1)[0] for seed in range(runs)]
    counts = np.bincount(first, minlength=blocks)
    assert abs(counts - runs / blocks).max() < 5 * (runs * (1 / blocks) * (1 - 1 / blocks)) ** 0.5
