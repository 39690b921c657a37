"""What `info` draws, against plain loops over what was put into the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from featurestore.errors import MissingFeatureError
from featurestore.format.codec import LOGPROB_ERROR, ROW_ERROR
from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.maintenance import inspect
from featurestore.maintenance.inspect import look_at, mass_by_rank
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SPECS, Filled, fill


def heads(given: LogitsFeatures) -> list[list[float]]:
    """Probabilities of each row's head, by rank."""
    ends = np.cumsum(given.counts, dtype=int)
    rows = zip(given.counts, ends, given.lse, strict=True)
    return [np.exp(given.logits[e - c : e].astype(np.float64) - lse).tolist() for c, e, lse in rows]


def test_mass_by_rank_is_the_mean_over_rows_that_are_learned_from(filled: Filled) -> None:
    reader = CacheReader.open(filled.path)
    found = mass_by_rank(reader)
    json.dumps(found.to_json(), allow_nan=False)
    rows = []
    for index, one in enumerate(reader.sample_ids):
        given, mask = filled.given[one][SPECS[0]], reader.read(index, []).loss_mask
        assert isinstance(given, LogitsFeatures)
        rows += [row for row, next_is_learned in zip(heads(given), mask[1:], strict=False) if next_is_learned]
    assert len(rows) < int(reader.lengths.sum()) - len(reader)  # some are prompts
    assert (found.samples, found.of, found.rows) == (len(reader), len(reader), len(rows))
    widest = max(map(len, rows))
    assert found.ranks == [1, 2, 4, 8][: len(found.ranks)] and found.ranks[-1] == widest
    for rank, p, mass, reached in zip(
        found.ranks, found.probability, found.cumulative, found.reached, strict=True
    ):
        at = np.mean([row[rank - 1] if len(row) >= rank else 0.0 for row in rows])
        assert p == pytest.approx(at, rel=np.expm1(LOGPROB_ERROR) + 1e-5)
        assert mass == pytest.approx(np.mean([sum(row[:rank]) for row in rows]), rel=0.08)
        assert reached == pytest.approx(np.mean([len(row) >= rank for row in rows]))
    # The whole head keeps its mass much better than each entry.
    assert found.cumulative[-1] == pytest.approx(np.mean([sum(row) for row in rows]), abs=4e-3)


@pytest.mark.parametrize(("k", "ranks"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_ranks_are_powers_of_two_and_the_widest(tmp_path: Path, k: int, ranks: list[int]) -> None:
    assert mass_by_rank(CacheReader.open(fill(tmp_path / "s", [LogitsSpec(k)], count=2).path)).ranks == ranks


def test_the_cost_is_bounded_and_the_samples_are_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CacheReader.open(fill(tmp_path / "s", [LogitsSpec(2)], count=90, shard_tokens=400).path)
    read: list[int] = []
    real = reader.read
    monkeypatch.setattr(reader, "read", lambda index, groups: (read.append(index), real(index, groups))[1])
    assert mass_by_rank(reader).samples == inspect.MAX_SAMPLES == len(set(read))
    assert max(np.diff(sorted(read))) <= 2 and max(read) >= 88
    monkeypatch.setattr(inspect, "MAX_ENTRIES", 300)
    read.clear()
    few = mass_by_rank(reader)
    entries = 2 * int(reader.lengths[read].sum())
    assert 300 <= entries < 300 + 2 * 40 and few.samples == len(read) < 20
    assert read[:4] == [0, 45, 22, 67]


def test_rows_of_a_sample_are_the_teachers(filled: Filled) -> None:
    reader = CacheReader.open(filled.path)
    index = int(np.argmax(reader.lengths))
    sample_id = reader.sample_ids[index]
    one, given = filled.samples[sample_id], filled.given[sample_id][SPECS[0]]
    assert isinstance(given, LogitsFeatures)
    view = look_at(reader, index, limit=10_000, best=3)
    json.dumps(view.to_json(), allow_nan=False)
    assert (view.index, view.id, view.length, len(view.rows)) == (index, one.id, len(one), len(one))
    ends = np.cumsum(given.counts, dtype=int)
    for t, (row, head) in enumerate(zip(view.rows, heads(given), strict=True)):
        last = t + 1 == len(one)
        assert (row.position, row.token, row.learned) == (t, one.tokens[t], one.loss_mask[t])
        assert row.next_token == (None if last else one.tokens[t + 1])
        if last:
            assert row.probability is None
        else:
            assert row.probability == pytest.approx(np.exp(given.label_logprob[t]), rel=2 * ROW_ERROR)
        start = ends[t] - given.counts[t]
        assert [token for token, _ in row.best] == given.ids[start : ends[t]][:3].tolist()
        np.testing.assert_allclose([p for _, p in row.best], head[:3], rtol=np.expm1(LOGPROB_ERROR) + 1e-5)
        assert row.head_mass == pytest.approx(sum(head), abs=4e-3)
        assert row.entropy == pytest.approx(given.entropy[t], abs=ROW_ERROR + 1e-6)
    assert look_at(reader, index, limit=2).rows == look_at(reader, index, limit=10_000).rows[:2]
    with pytest.raises(IndexError):
        look_at(reader, len(reader), limit=1)


def test_a_store_without_logits_says_so(tmp_path: Path) -> None:
    reader = CacheReader.open(fill(tmp_path / "s", [HiddenSpec(1, "bf16")], count=2).path)
    for look in (lambda: mass_by_rank(reader), lambda: look_at(reader, 0, 1)):
        with pytest.raises(MissingFeatureError, match="--top-k"):
            look()
