"""Small real stores, on disk and in object storage."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from featurestore.format.plan import Task, split_tasks
from featurestore.format.schema import GroupFeatures, GroupSpec, HiddenSpec, LogitsSpec, LseSpec, Sample
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from tests.featurestore.helpers import assert_same, features, identity, sample
from tests.s3 import Bucket

SPECS: list[GroupSpec] = [
    LogitsSpec(8, 0.9, tail=6),
    HiddenSpec(1, "bf16"),
    HiddenSpec(2, "int8"),
    LseSpec(2.0),
]


SMALL: list[GroupSpec] = [LogitsSpec(4, tail=3), HiddenSpec(1, "int8")]


@dataclass
class Filled:
    """A complete store, and what was put into it. path: its directory, or its URL as a string."""

    path: Any
    store: FeatureStore
    tasks: list[Task]
    samples: dict[str, Sample]
    given: dict[str, dict[GroupSpec, GroupFeatures]]


def fill(path: str | Path, specs: list[GroupSpec], count: int = 12, shard_tokens: int = 90) -> Filled:
    store = FeatureStore.create(path, identity())
    samples = {s.id: s for s in map(sample, range(count))}
    tasks = split_tasks([(s.id, len(s)) for s in samples.values()], shard_tokens)
    store.add_plan(tasks)
    store.put_teacher_files({"config.json": b"{}", "tokenizer.json": b"[1]"})
    given: dict[str, dict[GroupSpec, GroupFeatures]] = {}
    for task in tasks:
        members = [samples[s] for s in task.sample_ids]
        made = features(members, specs)
        store.write_bundle(task, members, made)
        for i, member in enumerate(members):
            given[member.id] = {spec: made[spec][i] for spec in specs}
    store.add_provenance({"argv": ["generate"], "seconds": 1.5})
    store.publish_manifest()
    return Filled(path, store, tasks, samples, given)


@dataclass
class Place:
    """A directory, or a bucket when there is one."""

    directory: Path
    bucket: Bucket | None

    def at(self, store: str) -> str | Path:
        """What opens the store of this name."""
        return self.directory / store if self.bucket is None else self.bucket.url(store)

    def contents(self, store: str) -> dict[str, tuple[object, bytes]]:
        """name -> (what changes when the file is replaced, its bytes)."""
        if self.bucket is None:
            root = self.directory / store
            files = (p for p in root.rglob("*") if p.is_file())
            return {str(p.relative_to(root)): (p.stat().st_ino, p.read_bytes()) for p in files}
        found = {}
        for name in self.bucket.names(store):
            head = self.bucket.client.head_object(Bucket=self.bucket.name, Key=f"{store}/{name}")
            found[name] = (head["VersionId"], self.bucket.read(store, name))
        return found

    def write(self, store: str, name: str, data: bytes | None) -> None:
        """Replace a file behind the store's back, or remove it."""
        if self.bucket is not None:
            self.bucket.write(store, name, data)
            return
        path = self.directory / store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)


def copy_of(template: Filled, path: Path) -> Filled:
    """The same store at another place; quicker than filling one, which syncs every file."""
    shutil.copytree(template.path, path)
    return dataclasses.replace(template, path=path, store=FeatureStore.open(path))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return fill(tmp_path_factory.mktemp("template") / "store", SPECS)


@pytest.fixture
def filled(template: Filled, tmp_path: Path) -> Filled:
    return copy_of(template, tmp_path / "store")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a test of what holds for every store makes its own."""
    if request.param == "local":
        return Place(tmp_path, None)
    return Place(tmp_path, request.getfixturevalue("bucket"))


@pytest.fixture
def filled_anywhere(template: Filled, place: Place) -> Filled:
    if place.bucket is None:
        return copy_of(template, place.directory / "store")
    place.bucket.upload(template.path, "store")
    url = place.bucket.url("store")
    return dataclasses.replace(template, path=url, store=FeatureStore.open(url))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return fill(tmp_path_factory.mktemp("small") / "store", SMALL, count=4, shard_tokens=60)


@pytest.fixture
def url(small: Filled, bucket: Bucket) -> str:
    """A complete store in the bucket; the same bytes as a local one, since the format is the same."""
    bucket.upload(small.path, "store")
    return bucket.url("store")


def read_everything(url: str, given: dict[str, Any]) -> None:
    reader = CacheReader.open(url)
    assert len(reader) == len(given)
    for i, sample_id in enumerate(reader.sample_ids):
        for spec, found in reader.read(i).features.items():
            assert_same(found, given[sample_id][spec])
