"""Small real stores on disk."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from featurestore.plan import Task, split_tasks
from featurestore.schema import GroupFeatures, GroupSpec, HiddenSpec, LogitsSpec, LseSpec, Sample
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample

SPECS: list[GroupSpec] = [
    LogitsSpec(8, 0.9, tail=6),
    HiddenSpec(1, "bf16"),
    HiddenSpec(2, "int8"),
    LseSpec(2.0),
]


@dataclass
class Filled:
    """A complete store, and what was put into it."""

    path: Path
    store: FeatureStore
    tasks: list[Task]
    samples: dict[str, Sample]
    given: dict[str, dict[GroupSpec, GroupFeatures]]


def fill(path: Path, specs: list[GroupSpec], count: int = 12, shard_tokens: int = 90) -> Filled:
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
