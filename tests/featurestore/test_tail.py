"""The points of the tail's draws: fixed for ever, the same in any batch, extendable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.format.codec import row_starts
from featurestore.format.kinds.table import covers
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.format.tail import first_draws, row_shifts, van_der_corput
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import identity, logits, sample, task_of


def test_points_are_stable_for_ever() -> None:
    """Caches are extended with these numbers. If this fails, the format has changed."""
    shifts = row_shifts(np.array([5, 6, 7], np.int32), 0, 3, 0)
    assert shifts.tolist() == [0.903859536578499, 0.9483694272592837, 0.2873240203310582]
    assert van_der_corput(6).tolist() == [0.0, 0.5, 0.25, 0.75, 0.125, 0.625]


def test_shifts_are_uniform_and_follow_from_tokens_position_and_seed_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 4000).astype(np.int64)
    shifts = row_shifts(tokens, 0, 4000, 3)
    np.testing.assert_array_equal(row_shifts(tokens.astype(np.int32), 100, 250, 3), shifts[100:250])
    assert (shifts != row_shifts(tokens, 0, 4000, 4)).all() and (shifts[1:] != shifts[:-1]).all()
    # Kolmogorov-Smirnov at one in a million.
    assert np.abs(np.sort(shifts) - (np.arange(4000) + 0.5) / 4000).max() < 2.7 / np.sqrt(4000)


@given(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1, exclude_max=True))
def test_fewer_draws_are_the_first_ones(have: int, want: int, shift: float) -> None:
    have, want = max(have, want), min(have, want)
    shifts = np.array([shift])
    every = np.sort((shift + van_der_corput(have)) % 1.0)
    few = np.sort((shift + van_der_corput(want)) % 1.0)
    np.testing.assert_array_equal(every[first_draws(shifts, have, want)[0]], few)


def drawn(p_TV: np.ndarray, tokens: np.ndarray, head: LogitsFeatures, count: int, seed: int) -> np.ndarray:
    """The draws of a capture, in plain numpy: inverse CDF in order of token id."""
    out = []
    starts = row_starts(head.counts)
    for t, shift in enumerate(row_shifts(tokens, 0, len(tokens), seed)):
        rest = p_TV[t].copy()
        rest[head.ids[starts[t] : starts[t + 1]]] = 0.0
        cdf = rest.cumsum()
        points = np.sort((shift + van_der_corput(count)) % 1.0)
        out.append(np.searchsorted(cdf, points * cdf[-1], side="right"))
    return np.array(out, dtype=np.int32)


def test_a_cache_of_many_draws_serves_fewer(tmp_path: Path) -> None:
    """What is served is what a capture with the smaller M would have stored."""
    one = sample(4, 30)
    p = np.random.default_rng(1).dirichlet(np.full(1000, 0.05), 30)
    head = logits(one, LogitsSpec(5))
    many, few = LogitsSpec(5, tail=50, seed=9), LogitsSpec(5, tail=12, seed=9)
    store = FeatureStore.create(tmp_path / "s", identity())
    store.add_plan([task_of([one])])
    full = LogitsFeatures(**{**vars(head), "tail_ids": drawn(p, one.tokens, head, 50, 9)})
    store.write_bundle(task_of([one]), [one], {many: [full]})
    store.publish_manifest()
    reader = CacheReader.open(tmp_path / "s")
    found = reader.read(0, [few, LogitsSpec(3)]).features
    narrow, plain = found[few], found[LogitsSpec(3)]
    assert isinstance(narrow, LogitsFeatures) and isinstance(plain, LogitsFeatures)
    np.testing.assert_array_equal(narrow.tail_ids, drawn(p, one.tokens, head, 12, 9))
    np.testing.assert_array_equal(narrow.ids, head.ids)
    assert plain.tail_ids is None and plain.counts.tolist() == [3] * 30


@pytest.mark.parametrize(
    ("want", "served"),
    [
        (LogitsSpec(8, 0.9, 16), True),
        (LogitsSpec(8, 0.9, 4), True),
        (LogitsSpec(8, 0.9), True),
        (LogitsSpec(4, 0.5), True),
        (LogitsSpec(8, 0.9, 17), False),
        (LogitsSpec(4, 0.9, 16), False),
        (LogitsSpec(8, 0.8, 16), False),
        (LogitsSpec(8, 0.9, 16, seed=1), False),
    ],
)
def test_draws_serve_the_same_head_and_seed_only(want: LogitsSpec, served: bool) -> None:
    assert covers(LogitsSpec(8, 0.9, 16), want) is served
    assert not covers(LogitsSpec(8, 0.9), want) or not want.tail
