"""Garbage is found and removed; committed data and bundles that may have a writer never are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from featurestore.errors import CorruptionError, StoreNotFoundError
from featurestore.format.schema import group_id
from featurestore.maintenance.gc import collect
from featurestore.maintenance.listing import list_shards
from featurestore.maintenance.verify import verify_store
from tests.featurestore.conftest import SPECS, Filled, Place
from tests.featurestore.helpers import sample, task_of
from tests.featurestore.version1 import as_version_1


def orphan(filled: Filled, age: float, name: str = "feedfeedfeed") -> Path:
    """A bundle as a killed writer leaves it, last touched `age` seconds ago."""
    bundle = filled.path / "parts" / f"{filled.tasks[0].id}-{name}"
    (bundle / group_id(SPECS[0])).mkdir(parents=True)
    (bundle / group_id(SPECS[0]) / "zarr.json").write_bytes(b"x" * 100)
    when = time.time() - age
    for path in (*bundle.rglob("*"), bundle):
        os.utime(path, (when, when))
    return bundle


def test_a_clean_store_has_no_garbage(filled_anywhere: Filled, place: Place) -> None:
    before = place.contents("store")
    assert collect(filled_anywhere.path, delete=True, min_age=0).orphans == []
    assert place.contents("store") == before


def test_old_orphans_go_and_young_ones_stay(filled: Filled) -> None:
    committed = set((filled.path / "parts").iterdir())
    old, young = orphan(filled, 4000), orphan(filled, 10, "beefbeefbeef")
    half = filled.path / "commit" / "samples" / ".tmp-0123456789abcdef"
    half.write_bytes(b"{")
    os.utime(half, (0, 0))
    listed = collect(filled.path)
    assert {o.path for o in listed.orphans if o.removable} == {
        str(p.relative_to(filled.path)) for p in (old, half)
    }
    assert listed.reclaimed == 101 and not listed.deleted and old.exists() and half.exists()
    assert collect(filled.path, delete=True).deleted
    assert set((filled.path / "parts").iterdir()) == {*committed, young} and not half.exists()
    assert [o.removable for o in collect(filled.path).orphans] == [False]
    assert verify_store(filled.path, deep=True).sound


def test_a_bundle_being_written_is_young_whatever_the_age_of_its_directory(filled: Filled) -> None:
    bundle = orphan(filled, 4000)
    newest = next(bundle.rglob("zarr.json"))
    os.utime(newest)
    assert [o.removable for o in collect(filled.path, delete=True).orphans] == [False] and bundle.exists()


@pytest.mark.parametrize("what", ["commit", "segment"])
def test_an_unreadable_record_stops_the_collection(filled: Filled, what: str) -> None:
    """It may name what looks like an orphan; of a manifest of version 2 the segment tells."""
    bundle = orphan(filled, 4000)
    if what == "commit":
        as_version_1(filled.path)
    folder = {"commit": "commit/samples", "segment": "segments"}[what]
    next((filled.path / folder).iterdir()).write_bytes(b"")
    with pytest.raises(CorruptionError):
        collect(filled.path, delete=True)
    assert bundle.exists()
    with pytest.raises(StoreNotFoundError):
        collect(filled.path / "parts")


def test_shards_are_listed_with_what_they_have(filled_anywhere: Filled) -> None:
    extra = task_of([sample(900, 7)])
    filled_anywhere.store.add_plan([extra])
    shards = {shard.task: shard for shard in list_shards(filled_anywhere.path)}
    assert set(shards) == {extra.id, *(task.id for task in filled_anywhere.tasks)}
    assert not shards[extra.id].complete and shards[extra.id].bytes == 0
    done = shards[filled_anywhere.tasks[0].id]
    assert done.complete and set(done.groups) == {"samples", *map(group_id, SPECS)}
    assert (done.rows, done.samples) == (filled_anywhere.tasks[0].rows, len(filled_anywhere.tasks[0].lengths))
    assert done.to_json()["bytes"] == sum(done.groups.values()) > 0
