"""The process that the kill test starts and kills: it completes a store, task by task."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import zarr  # noqa: F401  (loaded by the fork server, so that a child starts at once)

from featurestore.format.plan import Task, split_tasks
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, Sample
from featurestore.identity import SAMPLES
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample

SPECS: list[GroupSpec] = [LogitsSpec(5), HiddenSpec(1, "int8")]


def request() -> tuple[list[Task], dict[str, Sample]]:
    samples = {s.id: s for s in (sample(i, 5) for i in range(60))}
    return split_tasks([(s.id, len(s)) for s in samples.values()], 10), samples


def complete(path: Path, backwards: bool = False, progress: Connection | None = None) -> None:
    """Fulfil the request; tells `progress` when each bundle begins."""
    store = FeatureStore.create(path, identity())
    tasks, samples = request()
    store.add_plan(tasks)
    store.put_teacher_files({"config.json": b"{}"})
    done = store.commits().get(SAMPLES, {})
    for task in reversed(tasks) if backwards else tasks:
        if task.id in done:
            continue
        if progress is not None:
            progress.send(None)
        members = [samples[s] for s in task.sample_ids]
        store.write_bundle(task, members, features(members, SPECS))
    store.publish_manifest()
