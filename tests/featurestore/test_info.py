"""What `store_info` sums up equals what was put in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featurestore.codec import head_mass
from featurestore.info import store_info
from featurestore.schema import LogitsFeatures, group_id
from tests.featurestore.conftest import SPECS, Filled, Place
from tests.featurestore.helpers import sample, task_of


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
    hidden = info.groups[group_id(SPECS[2])]
    assert hidden.bytes_per_row == hidden.bytes / rows and hidden.mean_head_size is None
    assert set(hidden.arrays) == {"values", "scale", "zarr.json"}
