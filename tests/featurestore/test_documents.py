"""Keys of documents: kept beside the samples, no part of what a sample is, unknown in stores of before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurestore.errors import StoreFormatError
from featurestore.format.schema import LogitsSpec, Sample, document_key, joined
from featurestore.identity import digest, seal
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample, task_of
from tests.featurestore.test_fixture import FIXTURES
from tests.featurestore.version1 import as_version_1

SPEC = LogitsSpec(4)
KEYS = [("00" * 8, "11" * 8), (), ("22" * 8,)]


def named() -> list[Sample]:
    return [replace(sample(seed, 9), documents=keys) for seed, keys in enumerate(KEYS)]


def put(store: FeatureStore, members: list[Sample]) -> None:
    task = task_of(members)
    store.add_plan([task])
    store.write_bundle(task, members, features(members, [SPEC]))
    store.publish_manifest()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    made = FeatureStore.create(tmp_path / "store", identity())
    put(made, named())
    return made


def test_keys_come_back_and_change_no_id(store: FeatureStore) -> None:
    reader = CacheReader.open(store.path)
    assert reader.sample_ids == [sample(seed, 9).id for seed in range(3)]
    assert reader.documents() == [[keys] for keys in KEYS]
    assert [reader.read(index).documents for index in range(3)] == KEYS
    (task,) = store.known_tasks()
    assert [one.documents for one in store.read_samples(task)] == KEYS
    assert verify_store(store.path, deep=True).sound


def test_stores_of_before_know_none() -> None:
    reader = CacheReader.open(FIXTURES[1])
    assert reader.documents() == [[()]] * len(reader) and reader.read(0).documents == ()


def test_a_record_without_keys_is_written_as_before(tmp_path: Path) -> None:
    made = FeatureStore.create(tmp_path / "store", identity())
    put(made, [sample(0, 9)])
    (record,) = (tmp_path / "store" / "commit" / "samples").iterdir()
    assert "documents" not in json.loads(record.read_bytes())


def test_a_sample_of_two_tasks_has_the_keys_of_each(store: FeatureStore) -> None:
    put(store, [replace(sample(0, 9), documents=("33" * 8,)), sample(7, 9)])
    reader = CacheReader.open(store.path)
    found = dict(zip(reader.sample_ids, reader.documents(), strict=True))
    assert sorted(found[sample(0, 9).id]) == [KEYS[0], ("33" * 8,)]
    assert found[sample(7, 9).id] == [()]


@pytest.mark.parametrize(
    "forged",
    [
        [["00" * 8]],
        [["00" * 8], [], [], []],
        [["00" * 8], [], ["../../etc"]],
        [["00" * 8], [], ["00" * 16]],
        [["00" * 8], [], [7]],
        ["00" * 8, "00" * 8, "00" * 8],
        {"0": []},
    ],
)
def test_hostile_keys_are_refused(store: FeatureStore, forged: object) -> None:
    path = Path(store.path)
    as_version_1(path)
    (commit,) = (path / "commit" / "samples").iterdir()
    _reseal(commit, lambda record: record.update(documents=forged))
    (manifest,) = path.glob("MANIFEST-*")
    name = digest(commit.read_bytes())
    _reseal(manifest, lambda record: record["tasks"][commit.stem].update(samples=name))
    manifest.rename(path / f"MANIFEST-{digest(manifest.read_bytes())}.json")
    with pytest.raises(StoreFormatError, match="documents"):
        CacheReader.open(path).documents()


def _reseal(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_bytes())
    del record["blake3"]
    edit(record)
    path.write_bytes(seal(record))


def test_a_key_is_of_the_content() -> None:
    chat = [{"role": "user", "content": "a"}]
    names = {document_key("a"), document_key("b"), document_key(chat), document_key("\ud800")}
    assert len(names) == 4 and all(len(name) == 16 for name in names)
    assert document_key("a") == document_key("a")
    assert joined([("b", "a"), (), ("a", "c")]) == ("b", "a", "c")
