"""The store on disk: create or open it, plan, write bundles and commit them, publish a manifest.

Every writer is independent: there is no lock. A bundle is private until its commit record is published
with link(2), which never replaces; a writer that comes second leaves garbage and uses the winner's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurestore.bundle import read_samples
from featurestore.columns import Extent, Stats, layouts, pack
from featurestore.directory import (
    SPEC_FILE,
    committed_groups,
    committed_tasks,
    manifest_path,
    plan_names,
    provenance_names,
    read_provenance,
    read_spec,
    teacher_listings,
)
from featurestore.errors import (
    MissingFeatureError,
    SpecMismatchError,
    StoreFormatError,
)
from featurestore.files import (
    ensure_directory,
    hash_file,
    names_in,
    publish,
    read_bounded,
    sync,
    sync_tree,
    write_new,
    writing,
)
from featurestore.identity import FILE_NAME, SAMPLES, check_id, digest, header, seal
from featurestore.plan import Task
from featurestore.records import SAMPLES_FILE, CommitRecord, Manifest, commit_path, files_of, read_commit
from featurestore.schema import GroupFeatures, GroupSpec, HiddenSpec, Sample, TeacherIdentity, group_id
from featurestore.shard import write_group
from featurestore.tables import plan_name, plan_to_bytes, read_plan, samples_to_bytes


class FeatureStore:
    """A cache directory of one teacher. Safe to use from many processes at once, on one file system."""

    def __init__(self, path: Path, identity: TeacherIdentity) -> None:
        self.path = path
        self.identity = identity
        self._plans: dict[str, list[Task]] = {}

    @classmethod
    def create(cls, path: str | Path, identity: TeacherIdentity) -> FeatureStore:
        """Make a store, or open the one that is there if it has the same teacher.

        Raises SpecMismatchError for another teacher, StoreWriteError when the directory cannot be
        written, StoreFormatError when it is in use for something else.
        """
        root = Path(path)
        with writing("a store", root):
            root.mkdir(parents=True, exist_ok=True)
            if not (root / SPEC_FILE).exists():
                if names_in(root):
                    raise StoreFormatError(
                        f"{root} is not empty and holds no store; choose another directory"
                    )
                publish(root / SPEC_FILE, seal({**header("spec"), "teacher": identity.to_json()}))
                sync(root.parent)
        store = cls.open(root)
        differences = store.identity.differences(identity)
        if differences:
            listed = "; ".join(f"{n} is {a!r} there, {b!r} now" for n, a, b in differences)
            raise SpecMismatchError(f"the store {root} belongs to another teacher or engine: {listed}")
        return store

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open an existing store; StoreNotFoundError when there is none."""
        root = Path(path)
        return cls(root, read_spec(root)[0])

    def known_tasks(self) -> dict[str, Task]:
        """Every planned task by id, from all plan files."""
        for name in plan_names(self.path):
            if name not in self._plans:
                self._plans[name] = read_plan(self.path / name)
        return {task.id: task for _, tasks in sorted(self._plans.items()) for task in tasks}

    def add_plan(self, tasks: Sequence[Task]) -> None:
        """Publish a plan file with the tasks that are not planned yet."""
        known = self.known_tasks()
        new = [task for task in tasks if task.id not in known]
        if new:
            data = plan_to_bytes(new)
            with writing("a plan", self.path):
                publish(self.path / plan_name(data), data)

    def commits(self) -> dict[str, dict[str, CommitRecord]]:
        """group id ("samples" included) -> task id -> record, of everything that is committed."""
        return {
            group: {task: read_commit(self.path, group, task) for task in committed_tasks(self.path, group)}
            for group in committed_groups(self.path)
        }

    def group_specs(self) -> dict[str, GroupSpec]:
        """Spec of every column group that at least one task has."""
        specs: dict[str, GroupSpec] = {}
        for group in committed_groups(self.path):
            tasks = committed_tasks(self.path, group)
            if group != SAMPLES and tasks:
                spec = read_commit(self.path, group, tasks[0]).spec
                assert spec is not None
                specs[group] = spec
        return specs

    def read_samples(self, task_id: str) -> list[Sample]:
        """Tokens and masks of a committed task, in the task's order."""
        task = self.known_tasks().get(task_id)
        if task is None or not commit_path(self.path, SAMPLES, task_id).exists():
            raise MissingFeatureError(f"the samples of task {task_id} are not committed in {self.path}")
        return read_samples(self.path, read_commit(self.path, SAMPLES, task_id), task)

    def write_bundle(
        self,
        task: Task,
        samples: Sequence[Sample],
        features: Mapping[GroupSpec, Sequence[GroupFeatures]],
    ) -> list[CommitRecord]:
        """Write and commit the samples and features of one task; what is committed already is kept.

        samples: in the task's order. features: per group one entry per sample. Returns the record of each
        group in `features`, then that of the samples, whichever writer's they are. Raises ValueError for
        numbers that the contract excludes, StoreWriteError when the disk refuses.
        """
        self._check_samples(task, samples)
        missing = {g: f for g, f in features.items() if not self._commit_path(g, task).exists()}
        packed = {
            spec: pack(spec, given, task.lengths, self.identity.vocab_size, self.identity.hidden_size)
            for spec, given in missing.items()
            if self._checked(spec)
        }
        has_samples = self._commit_path(None, task).exists()
        if packed or not has_samples:
            self._write_and_commit(task, packed, None if has_samples else samples)
        # The samples come last: a task that has them has whatever its first bundle set out to hold.
        groups = [*(group_id(spec) for spec in features), SAMPLES]
        return [read_commit(self.path, group, task.id) for group in groups]

    def commit(self, records: Sequence[CommitRecord]) -> None:
        """Publish the records of durable, private bundles, in this order; a record that is there stays.

        Raises StoreWriteError when the disk refuses.
        """
        with writing("commit records", self.path):
            # For `gc`, which takes a bundle that nobody has touched for long as garbage.
            for bundle in {record.bundle for record in records}:
                os.utime(self.path / "parts" / bundle)
            for record in records:
                path = commit_path(self.path, record.group, record.task)
                ensure_directory(path.parent, self.path)
                publish(path, record.to_bytes())

    def publish_manifest(self) -> Manifest:
        """Publish the list of all that is committed now. The same commits give the same manifest."""
        tasks: dict[str, dict[str, str]] = {}
        specs: dict[str, GroupSpec] = {}
        for group in committed_groups(self.path):
            for task in committed_tasks(self.path, group):
                data = read_bounded(commit_path(self.path, group, task))
                record = CommitRecord.from_bytes(data, group, task, f"commit/{group}/{task}.json")
                tasks.setdefault(task, {})[group] = digest(data)
                if record.spec is not None:
                    specs[group] = record.spec
        complete = {task: groups for task, groups in sorted(tasks.items()) if SAMPLES in groups}
        if not complete:
            raise StoreFormatError(f"nothing is committed in {self.path} yet, so there is nothing to list")
        manifest = Manifest(
            spec=read_spec(self.path)[1],
            plans=tuple(plan_names(self.path)),
            teacher=tuple(teacher_listings(self.path)),
            groups={group: specs[group] for group in sorted(specs)},
            tasks=complete,
        )
        with writing("a manifest", self.path):
            publish(manifest_path(self.path, manifest.digest), manifest.to_bytes())
        return manifest

    def put_teacher_files(self, files: Mapping[str, bytes]) -> None:
        """Keep small files of the teacher (config, tokenizer) in teacher/; a name's first content stays."""
        for name in files:
            check_id(name, FILE_NAME, "teacher file")
        folder = self.path / "teacher"
        with writing("teacher files", self.path):
            ensure_directory(folder, self.path)
            for name, data in files.items():
                publish(folder / name, data)
            listing = {name: list(hash_file(folder / name)) for name in sorted(files)}
            data = seal({**header("teacher"), "files": listing})
            publish(self.path / f"TEACHER-{digest(data)}.json", data)

    def add_provenance(self, record: Mapping[str, Any]) -> str:
        """Keep a JSON record of one run (argv, versions, seconds); returns its id."""
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        folder = self.path / "provenance"
        with writing("provenance", self.path):
            ensure_directory(folder, self.path)
            # Through JSON once, so that what is sealed is what a reader parses.
            record = json.loads(json.dumps(dict(record), allow_nan=False))
            publish(folder / f"{name}.json", seal({**header("provenance"), "id": name, "record": record}))
        return name

    def provenance(self) -> list[dict[str, Any]]:
        """The records of all runs, oldest first."""
        return [read_provenance(self.path, name) for name in provenance_names(self.path)]

    def _commit_path(self, spec: GroupSpec | None, task: Task) -> Path:
        return commit_path(self.path, SAMPLES if spec is None else group_id(spec), task.id)

    def _checked(self, spec: GroupSpec) -> bool:
        if isinstance(spec, HiddenSpec) and spec.layer > self.identity.num_layers:
            raise ValueError(f"the teacher has {self.identity.num_layers} layers, no layer {spec.layer}")
        return True

    def _check_samples(self, task: Task, samples: Sequence[Sample]) -> None:
        if tuple(sample.id for sample in samples) != task.sample_ids:
            raise ValueError(f"these are not the samples of task {task.id}, in its order")
        for sample in samples:
            if int(sample.tokens.max()) >= self.identity.vocab_size:
                raise ValueError(f"sample {sample.id} has token ids outside the teacher's vocabulary")

    def _write_and_commit(
        self,
        task: Task,
        packed: Mapping[GroupSpec, tuple[Mapping[str, Any], Stats]],
        samples: Sequence[Sample] | None,
    ) -> None:
        name = f"{task.id}-{secrets.token_hex(6)}"
        with writing(f"task {task.id}", self.path):
            ensure_directory(self.path / "parts", self.path)
            bundle = self.path / "parts" / name
            bundle.mkdir()
            try:
                records = self._write_private(bundle, task, packed, samples)
            except BaseException:
                # Nothing refers to the bundle yet. Once publishing has begun, something may.
                shutil.rmtree(bundle, ignore_errors=True)
                raise
            self.commit(records)

    def _write_private(
        self,
        bundle: Path,
        task: Task,
        packed: Mapping[GroupSpec, tuple[Mapping[str, Any], Stats]],
        samples: Sequence[Sample] | None,
    ) -> list[CommitRecord]:
        """Fill a bundle, make it durable, and hash it by reading it back. Samples come last."""
        contents: list[tuple[GroupSpec | None, str, Stats]] = []
        for spec, (arrays, stats) in packed.items():
            group = group_id(spec)
            extent = Extent.of(task, stats, self.identity)
            attributes = {"task": task.id, "group": group, "spec": spec.to_json()}
            write_group(bundle / group, attributes, layouts(spec, extent), arrays)
            contents.append((spec, group, stats))
        if samples is not None:
            write_new(bundle / SAMPLES_FILE, samples_to_bytes(samples))
            contents.append((None, SAMPLES, {}))
        sync_tree(bundle)
        sync(bundle.parent)
        return [
            CommitRecord(
                task=task.id,
                group=group,
                spec=spec,
                bundle=bundle.name,
                rows=task.rows,
                samples=len(task.lengths),
                files={file: hash_file(bundle / file) for file in files_of(spec, group)},
                stats=stats,
            )
            for spec, group, stats in contents
        ]
