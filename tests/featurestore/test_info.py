"""What `store_info` sums up equals what was put in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore.catalogue.manifest import fullest_manifest, read_manifest
from featurestore.format.codec import head_mass
from featurestore.format.schema import HiddenSpec, LogitsFeatures, group_id
from featurestore.maintenance.info import store_info
from featurestore.store import FeatureStore
from tests.featurestore.conftest import SPECS, Filled, Place
from tests.featurestore.helpers import HIDDEN, hidden, identity, sample, task_of


def test_info_sums_up_the_store(filled_anywhere: Filled, place: Place) -> None:
    filled_anywhere.store.add_plan([task_of([sample(500, 9)])])
    info = store_info(filled_anywhere.path)
    json.dumps(info.to_json(), allow_nan=False)
    rows = sum(task.rows for task in filled_anywhere.tasks)
    assert (info.samples, info.rows) == (len(filled_anywhere.samples), rows)
    assert (info.samples_planned, info.rows_planned) == (info.samples + 1, rows + 9)
    assert sum(info.length_histogram.values()) == info.samples
    assert info.manifest and [r["argv"] for r in info.provenance] == [["generate"]]

    logits = info.groups[group_id(SPECS[0])]
    given = [
        f
        for features in filled_anywhere.given.values()
        for f in features.values()
        if isinstance(f, LogitsFeatures)
    ]
    labels = np.concatenate([f.label_logprob[:-1] for f in given]).astype(np.float64)
    mass = np.concatenate([head_mass(f.counts, f.logits, f.lse) for f in given])
    assert logits.tasks_done == len(filled_anywhere.tasks) == logits.tasks_total - 1
    assert logits.mean_head_size == pytest.approx(np.concatenate([f.counts for f in given]).mean())
    assert logits.mean_head_mass == pytest.approx(mass.mean())
    assert logits.perplexity == pytest.approx(np.exp(-labels.mean()))

    on_disk = sum(
        len(data) for name, (_, data) in place.contents("store").items() if name.startswith("parts/")
    )
    assert info.bytes == on_disk == sum(sum(g.arrays.values()) for g in info.groups.values())
    states = info.groups[group_id(SPECS[2])]
    assert states.bytes_per_row == states.bytes / rows and states.mean_head_size is None
    assert set(states.arrays) == {"values", "scale", "zarr.json"}
    assert states.relative_error is None, "nobody measured it, as in stores of before"


def test_the_error_of_hidden_states_is_summed_up_and_listed(tmp_path: Path) -> None:
    store, spec = FeatureStore.create(tmp_path / "s", identity()), HiddenSpec(1, "int8")
    error, norm = [], []
    for seed in range(3):
        one = sample(seed, 20)
        rng = np.random.default_rng(seed)
        error.append(rng.random(20, dtype=np.float32))
        norm.append(1000 * rng.random(20, dtype=np.float32))
        given = replace(hidden(one, spec), squared_error=error[-1], squared_norm=norm[-1])
        store.add_plan([task_of([one])])
        store.write_bundle(task_of([one]), [one], {spec: [given]})
    manifest = store.publish_manifest()
    sums = {"squared_error": np.concatenate(error).sum(dtype=np.float64)}
    sums["squared_norm"] = np.concatenate(norm).sum(dtype=np.float64)
    assert manifest.stats == {group_id(spec): pytest.approx(sums)}
    assert read_manifest(store.root, manifest.digest).stats == manifest.stats
    ratio = np.sqrt(sums["squared_error"] / sums["squared_norm"])
    assert store_info(store.path).groups[group_id(spec)].relative_error == pytest.approx(ratio)


def test_an_error_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    store, spec, one = FeatureStore.create(tmp_path / "s", identity()), HiddenSpec(1, "f32"), sample(1, 4)
    rows = np.full(4, np.inf, np.float32)
    given = replace(hidden(one, spec), squared_error=rows, squared_norm=rows)
    store.add_plan([task_of([one])])
    (record, _) = store.write_bundle(task_of([one]), [one], {spec: [given]})
    assert record.stats == {} and not store.publish_manifest().stats
    with pytest.raises(ValueError, match="go together"):
        replace(given, squared_norm=None).check(4, HIDDEN)


def test_manifests_list_sums_over_their_tasks(filled: Filled) -> None:
    """Logits of all tasks, but how many ids are distinct adds up to nothing."""
    manifest = read_manifest(filled.store.root, str(fullest_manifest(filled.store.root)))
    records = filled.store.commits()[group_id(SPECS[0])].values()
    sums = manifest.stats[group_id(SPECS[0])]
    assert set(manifest.stats) == {group_id(SPECS[0])}
    assert set(sums) == {"entries", "labels", "head_mass", "label_logprob", "entropy"}
    for name, number in sums.items():
        assert number == pytest.approx(sum(record.stats[name] for record in records))
