"""The reader: what it serves, narrower requests, worker processes, and its cost per sample."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from featurestore import reader as reader_module
from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec, LseSpec, group_id
from featurestore.reader import CacheReader
from tests.featurestore.conftest import SPECS, Filled, Place, fill
from tests.featurestore.helpers import assert_same


def test_reads_any_order_with_few_bundles_open(
    filled_anywhere: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "OPEN_BUNDLES", 1)
    reader = CacheReader.open(filled_anywhere.path)
    assert reader.identity == filled_anywhere.store.identity and (reader.teacher_dir / "config.json").exists()
    for i in np.random.default_rng(0).integers(0, len(reader), 40).tolist():
        found = reader.read(i)
        assert set(found.features) == set(SPECS)
        for spec, value in found.features.items():
            assert_same(value, filled_anywhere.given[reader.sample_ids[i]][spec])
    for bad in (-1, len(reader)):
        with pytest.raises(IndexError):
            reader.read(bad)


def test_lengths_are_an_array_to_whoever_computes_with_them(filled: Filled) -> None:
    """A comparison that gave one bool would be silently wrong."""
    reader = CacheReader.open(filled.path)
    whole = np.asarray([len(reader.read(i).tokens) for i in range(len(reader))])
    assert len(set(whole.tolist())) > 1
    for found, wanted in (
        (reader.lengths == whole[0], whole == whole[0]),
        (whole[0] < reader.lengths, whole[0] < whole),
        (2 * reader.lengths - reader.lengths, whole),
        (np.minimum(reader.lengths, 5), np.minimum(whole, 5)),
        (reader.lengths[[1, 0]], whole[[1, 0]]),
    ):
        assert isinstance(found, np.ndarray) and found.dtype == np.asarray(wanted).dtype
        np.testing.assert_array_equal(found, wanted)
    assert (reader.lengths.sum(), reader.lengths.max()) == (whole.sum(), whole.max())


def test_only_what_is_asked_for_is_read(filled: Filled) -> None:
    reader = CacheReader.open(filled.path)
    assert list(reader.read(0, [SPECS[1]]).features) == [SPECS[1]]
    assert reader.read(0, []).features == {}


def test_a_narrower_request_is_served_from_the_wider_group(filled_anywhere: Filled) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    wide, narrow = reader.find("logits"), LogitsSpec(3, 0.9)
    assert wide == SPECS[0]
    found = reader.read(2, [wide, narrow]).features
    whole, part = found[wide], found[narrow]
    assert isinstance(whole, LogitsFeatures) and isinstance(part, LogitsFeatures)
    np.testing.assert_array_equal(part.counts, np.minimum(whole.counts, 3))
    ends = np.cumsum(whole.counts, dtype=int)
    rows = [whole.ids[e - c : e][:3] for c, e in zip(whole.counts, ends, strict=True)]
    np.testing.assert_array_equal(part.ids, np.concatenate(rows))


def test_warming_verifies_and_changes_nothing(filled_anywhere: Filled, place: Place) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    for index in range(len(reader)):
        reader.warm(index, SPECS)
    found = reader.read(0)
    for spec, value in found.features.items():
        assert_same(value, filled_anywhere.given[found.id][spec])
    reader.warm(0, [LogitsSpec(9, 0.9)])


def test_warming_finds_damage_in_the_groups_asked_for(filled_anywhere: Filled, place: Place) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    contents = place.contents("store")
    for name, (_, data) in contents.items():
        if group_id(SPECS[0]) in name and name.endswith("head_index/c/0"):
            place.write("store", name, b"\0" * len(data))
    for index in range(len(reader)):
        with pytest.raises(CorruptionError, match="hash is not the committed one"):
            reader.warm(index, SPECS)
        reader.warm(index, SPECS[1:])


def test_missing_groups_name_what_there_is_and_the_flag(filled: Filled) -> None:
    reader = CacheReader.open(filled.path)
    with pytest.raises(MissingFeatureError) as caught:
        reader.find("hidden.L3")
    assert "--hidden-layers 3" in str(caught.value) and "hidden.L1, hidden.L2, logits" in str(caught.value)
    with pytest.raises(MissingFeatureError, match=r"--temperatures 0\.5`"):
        reader.find("lse.T0.5")
    assert reader.find("lse.T2") == LseSpec(2)
    with pytest.raises(MissingFeatureError):
        reader.read(0, [LogitsSpec(9, 0.9)])
    with pytest.raises(StoreFormatError, match=r"0 manifests .* there are"):
        CacheReader.open(filled.path, "feed")
    only_hidden = fill(filled.path.parent / "h", [HiddenSpec(1, "bf16")], count=2)
    with pytest.raises(MissingFeatureError, match="--top-k"):
        CacheReader.open(only_hidden.path).find("logits")


def _lse_sum(reader: CacheReader, index: int) -> float:
    value = reader.read(index, [SPECS[0]]).features[SPECS[0]]
    assert isinstance(value, LogitsFeatures)
    return float(value.lse.sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(filled_anywhere: Filled, method: str) -> None:
    reader = CacheReader.open(filled_anywhere.path)
    here = [_lse_sum(reader, i) for i in range(len(reader))]
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap(_lse_sum, [(reader, i) for i in range(len(reader))])
    assert there == here
    assert len(pickle.dumps(reader)) < 1000


def test_a_read_costs_about_a_millisecond(tmp_path: Path) -> None:
    reader = CacheReader.open(fill(tmp_path / "s", SPECS, count=30, shard_tokens=1000).path)
    for i in range(len(reader)):
        reader.read(i)
    start = time.perf_counter()
    for i in range(len(reader)):
        reader.read(i)
    # Measured 0.4 ms; the bound leaves room for a loaded machine and still excludes tens of milliseconds.
    assert (time.perf_counter() - start) / len(reader) < 0.01
