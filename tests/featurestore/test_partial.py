"""Partial logits groups: heads alone are known. What is unknown is NaN, and never enters a sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.kinds.table import covers
from featurestore.format.schema import LogitsFeatures, LogitsSpec, Sample, group_id
from featurestore.maintenance.info import store_info
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import assert_same, identity, logits, sample, task_of

PARTIAL = LogitsSpec(8, partial=True)


def blind(one: Sample) -> LogitsFeatures:
    """Features that do not know every third label, nor any entropy."""
    full = logits(one, LogitsSpec(8))
    label = full.label_logprob.copy()
    label[::3] = np.nan
    return replace(full, label_logprob=label, entropy=np.full_like(full.entropy, np.nan))


def store_of(path: Path) -> tuple[FeatureStore, list[Sample]]:
    samples = [sample(seed, 10) for seed in range(3)]
    store = FeatureStore.create(path, identity())
    store.add_plan([task_of(samples)])
    store.write_bundle(task_of(samples), samples, {PARTIAL: [blind(one) for one in samples]})
    store.publish_manifest()
    return store, samples


def test_unknown_numbers_come_back_unknown(tmp_path: Path) -> None:
    store, samples = store_of(tmp_path / "store")
    reader = CacheReader.open(store.path)
    assert reader.find("logits") == PARTIAL
    for i, one in enumerate(samples):
        assert_same(reader.read(i).features[PARTIAL], blind(one))
        narrow = reader.read(i, [LogitsSpec(3, partial=True)]).features[LogitsSpec(3, partial=True)]
        assert isinstance(narrow, LogitsFeatures) and narrow.counts.tolist() == [3] * 10


def test_sums_are_of_what_is_known(tmp_path: Path) -> None:
    store, samples = store_of(tmp_path / "store")
    stats = store.commits()[group_id(PARTIAL)][task_of(samples).id].stats
    labels = np.concatenate([blind(one).label_logprob for one in samples])
    assert stats["labels"] == 3 * 6 and stats["entropy"] == 0.0
    assert stats["label_logprob"] == pytest.approx(float(np.nansum(labels)), rel=1e-5)
    info = store_info(store.path).groups[group_id(PARTIAL)]
    assert info.perplexity is None and info.mean_entropy is None
    assert info.mean_head_size == 8


def test_a_full_group_is_preferred_and_serves_both(tmp_path: Path) -> None:
    store, samples = store_of(tmp_path / "store")
    narrow = LogitsSpec(4)
    store.write_bundle(task_of(samples), samples, {narrow: [logits(one, narrow) for one in samples]})
    store.publish_manifest()
    assert CacheReader.open(store.path).find("logits") == narrow
    assert not covers(PARTIAL, narrow)
    assert not covers(PARTIAL, LogitsSpec(8)) and covers(LogitsSpec(8), PARTIAL)
    assert not covers(PARTIAL, LogitsSpec(9, partial=True))


def test_ids_of_whole_groups_stay() -> None:
    assert "partial" not in LogitsSpec(50).to_json()
    assert (
        group_id(LogitsSpec(50, partial=False)) == "logits-357ca350" != group_id(LogitsSpec(50, partial=True))
    )


@pytest.mark.parametrize(
    ("spec", "change", "what"),
    [
        (PARTIAL, {"entropy": np.zeros(10, np.float32)}, "entropy"),
        (PARTIAL, {"label_logprob": np.full(10, -np.inf, np.float32)}, "label_logprob"),
        (PARTIAL, {"label_logprob": np.zeros(10, np.float32)}, "label_logprob"),
        (LogitsSpec(8), {}, "entropy"),
        (LogitsSpec(8), {"entropy": np.zeros(10, np.float32)}, "label_logprob"),
    ],
)
def test_nan_is_for_partial_groups_alone(
    tmp_path: Path, spec: LogitsSpec, change: dict[str, np.ndarray], what: str
) -> None:
    one = sample(1, 10)
    store = FeatureStore.create(tmp_path / "store", identity())
    with pytest.raises(ValueError, match=what):
        store.write_bundle(task_of([one]), [one], {spec: [replace(blind(one), **change)]})
