"""The store: create or open it, plan, write bundles and commit them, publish a manifest.

Every writer is independent: there is no lock. A bundle is private until its commit record is published
with link(2), which never replaces; a writer that comes second leaves garbage and uses the winner's.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distily.safety.redaction import for_record
from featurestore.bundle import read_samples
from featurestore.catalogue.inventory import Inventory, take_stock
from featurestore.catalogue.manifest import Manifest, head_names
from featurestore.catalogue.pending import Pending, pending_bundles
from featurestore.catalogue.publishing import publish_newest
from featurestore.errors import (
    MissingFeatureError,
    SpecMismatchError,
    StoreFormatError,
)
from featurestore.format.arrays import write_group
from featurestore.format.columns import Extent, Stats
from featurestore.format.directory import (
    SPEC_FILE,
    committed_groups,
    committed_tasks,
    plan_names,
    provenance_names,
    read_provenance,
    read_spec,
    teacher_listings,
)
from featurestore.format.kinds.table import kind_of, pack
from featurestore.format.mismatch import explain
from featurestore.format.plan import Task
from featurestore.format.records import (
    SAMPLES_FILE,
    CommitRecord,
    RunCost,
    Stamp,
    commit_name,
    files_of,
    read_commit,
    unrecorded,
)
from featurestore.format.schema import GroupFeatures, GroupSpec, Sample, TeacherIdentity, group_id
from featurestore.format.sidecar import load_basis, sidecar_files
from featurestore.format.states.transform import Basis
from featurestore.format.tables import plan_name, plan_to_bytes, samples_to_bytes
from featurestore.identity import FILE_NAME, SAMPLES, check_id, digest, header, seal
from featurestore.storage.files import MAX_RECORD_BYTES, hash_file, write_new, writing
from featurestore.storage.protocol import PENDING, Root
from featurestore.storage.root import root_of


def _spec(identity: TeacherIdentity) -> bytes:
    """The content of SPEC.json."""
    return seal({**header("spec"), "teacher": identity.to_json()})


class FeatureStore:
    """The cache of one teacher, as those write it who fill it. Readers use `CacheReader`.

    It is safe to use from many processes at once, on a file system or an object store.

    Attributes:
        path: where the store lies.
        identity: the teacher, its tokenizer and its engine.

    Example:
        store = FeatureStore.open("run/cache")
        print(len(store.known_tasks()), "tasks;", list(store.group_specs()))
    """

    def __init__(self, root: Root, identity: TeacherIdentity) -> None:
        self.path = root.location
        self.root = root
        self.identity = identity
        self._plans: dict[str, list[Task]] = {}

    @classmethod
    def create(cls, path: str | Path, identity: TeacherIdentity) -> FeatureStore:
        """Make a store, or open the one that is there if it has the same teacher. One in which nothing was
        ever committed, as a run leaves it that failed early, becomes the store of this teacher.

        Args:
            path: a local directory, s3://bucket/prefix or gs://bucket/prefix.
            identity: whose features it will hold.

        Returns:
            The store, new or as it was found.

        Raises:
            SpecMismatchError: it holds features of another teacher.
            StoreWriteError: the place cannot be written.
            StoreFormatError: the place is in use for something else.
        """
        root = root_of(path)
        with writing("a store", root.location):
            # In this order: another process that makes the store meanwhile writes SPEC.json before all else.
            held = root.names("")
            if not root.exists(SPEC_FILE):
                if held:
                    raise StoreFormatError(
                        f"{root.location} is not empty and holds no store; choose another directory"
                    )
                root.make()
                root.publish(SPEC_FILE, _spec(identity))
        store = cls(root, read_spec(root)[0])
        if store.identity.differences(identity) and store.is_empty():
            with writing("a store", root.location):
                store._give_to(identity)
            # Anew: copies of an object store are kept by the SPEC.json that they belong to.
            root = root_of(path)
            store = cls(root, read_spec(root)[0])
        if store.identity.differences(identity):
            raise SpecMismatchError(explain(root.location, store.identity, identity))
        return store

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open an existing store.

        Args:
            path: a local directory, s3://bucket/prefix or gs://bucket/prefix.

        Raises:
            StoreNotFoundError: there is none.
            StoreFormatError: it is of a version that is not known.
            CorruptionError: SPEC.json is damaged.
            StoreAccessError: the object store does not answer.
        """
        root = root_of(path)
        return cls(root, read_spec(root)[0])

    def is_empty(self) -> bool:
        """Whether no column group of any task is committed."""
        return not head_names(self.root) and not any(
            committed_tasks(self.root, group) for group in committed_groups(self.root)
        )

    def _give_to(self, identity: TeacherIdentity) -> None:
        """Replace SPEC.json, unless something is committed, and remove what the runs before have prepared.

        A writer of the old identity may be at work. It looks at SPEC.json after it has published a record
        (`commit`), we at the records after we have replaced SPEC.json: at least one sees the other.
        """
        self.root.replace(SPEC_FILE, _spec(identity))
        if not self.is_empty():
            self.root.replace(SPEC_FILE, _spec(self.identity))
            return
        listings = [*plan_names(self.root), *teacher_listings(self.root)]
        listings += [f"{PENDING}/{bundle}.json" for bundle in pending_bundles(self.root)]
        for name in [*listings, *(f"teacher/{file}" for file in self.root.names("teacher"))]:
            self.root.remove(name, lambda _: False)

    def inventory(self) -> Inventory:
        """What is listed, committed and planned now, at the cost of what no manifest lists yet."""
        return take_stock(self.root, self._plans)

    def known_tasks(self) -> dict[str, Task]:
        """Every planned or committed task by id. Reads the list of the whole store: `inventory` finds the
        tasks of given samples in a large one.
        """
        return self.inventory().tasks()

    def add_plan(self, tasks: Sequence[Task]) -> None:
        """Publish a plan file with these tasks. One that is planned already does no harm, but is read again
        by whoever looks at the plans.

        Raises:
            StoreWriteError: the place cannot be written.
        """
        if tasks:
            data = plan_to_bytes(tasks)
            with writing("a plan", self.path):
                self.root.publish(plan_name(data), data)

    def commits(self) -> dict[str, dict[str, CommitRecord]]:
        """group id ("samples" included) -> task id -> record, of everything that is committed, listed or not.
        Reads all commit records.
        """
        return {group: self._records(group) for group in committed_groups(self.root)}

    def group_specs(self) -> dict[str, GroupSpec]:
        """Spec of every column group that at least one task has."""
        return self.inventory().specs

    def read_samples(self, task_id: str) -> list[Sample]:
        """Tokens and masks of a committed task, in the task's order.

        Raises:
            MissingFeatureError: the task is not planned, or its samples are not committed.
            CorruptionError: the bytes are not those that were committed.
        """
        task = self.inventory().task(task_id)
        if task is None or not self._has(None, task):
            raise MissingFeatureError(f"the samples of task {task_id} are not committed in {self.path}")
        return read_samples(self.root, read_commit(self.root, SAMPLES, task_id), task)

    def holds(self, task: Task, groups: Sequence[GroupSpec]) -> bool:
        """Whether the samples of a task and these very groups are committed by now."""
        return all(self._has(spec, task) for spec in (None, *groups))

    def write_bundle(
        self,
        task: Task,
        samples: Sequence[Sample],
        features: Mapping[GroupSpec, Sequence[GroupFeatures]],
        run: RunCost | None = None,
    ) -> list[CommitRecord]:
        """Write and commit the samples and features of one task; what is committed already is kept.

        Args:
            task: one that `add_plan` has published.
            samples: those of the task, in its order.
            features: for each group one entry per sample.
            run: what the run has spent so far; it is kept in the records.

        Returns:
            The record of each group in `features`, then that of the samples. Where another writer committed
            first, the record is the other writer's.

        Raises:
            ValueError: the samples are not those of the task, or a value is one that the format excludes.
            StoreWriteError: the place cannot be written.
            SpecMismatchError: the store, empty until now, was given to another teacher meanwhile.
        """
        self.commit(self.prepare_bundle(task, samples, features, run))
        return self.read_records(task, features)

    def prepare_bundle(
        self,
        task: Task,
        samples: Sequence[Sample],
        features: Mapping[GroupSpec, Sequence[GroupFeatures]],
        run: RunCost | None = None,
    ) -> list[CommitRecord]:
        """Write what of this is not committed yet into a durable, private bundle; see `write_bundle`.

        Nothing of it counts before `commit`, so that several threads may prepare bundles which one commits in
        order.

        Returns:
            The records to commit, in the order for `commit`; none if all is committed already.
        """
        self._check_samples(task, samples)
        missing = {g: f for g, f in features.items() if not self._has(g, task)}
        packed = {spec: pack(spec, given, task.lengths, self.identity) for spec, given in missing.items()}
        has_samples = self._has(None, task)
        if not packed and has_samples:
            return []
        name = f"{task.id}-{secrets.token_hex(6)}"
        with writing(f"task {task.id}", self.path):
            folder = self.root.begin(name)
            try:
                records = self._write_private(name, folder, task, packed, None if has_samples else samples)
                groups = tuple(record.group for record in records)
                self.announce(Pending(bundle=name, task=task, groups=groups))
            except BaseException:
                self.root.abandon(name)
                raise
        return [replace(record, run=run) for record in records]

    def announce(self, marker: Pending) -> None:
        """Have the next manifest look at the records of a bundle. Comes after its files and before its first
        record; `prepare_bundle` does it.
        """
        self.root.publish(marker.name, marker.to_bytes())

    def read_records(self, task: Task, groups: Iterable[GroupSpec]) -> list[CommitRecord]:
        """The committed record of each of these groups of a task, then that of its samples."""
        # The samples come last: a task that has them has whatever its first bundle set out to hold.
        names = [*(group_id(spec) for spec in groups), SAMPLES]
        return [read_commit(self.root, name, task.id) for name in names]

    def commit(self, records: Sequence[CommitRecord]) -> None:
        """Publish the records of durable, private bundles, in this order; a record that is there stays.

        Args:
            records: of bundles whose files are all written and durable.

        Raises:
            StoreWriteError: the place cannot be written.
            SpecMismatchError: the store, empty until now, was given to another teacher meanwhile.
        """
        if not records:
            return
        with writing("commit records", self.path):
            for bundle in {record.bundle for record in records}:
                self.root.finish(bundle)
            names = {commit_name(record.group, record.task): record.to_bytes() for record in records}
            published = [name for name, data in names.items() if self.root.publish(name, data)]
            if not self.root.same(SPEC_FILE, _spec(self.identity)):
                for name in published:
                    self.root.remove(name, lambda _: False)
                raise SpecMismatchError(
                    f"the store {self.path} was empty and has been given to another teacher by a command "
                    "that began later; nothing of this run is kept, give it another --out"
                )

    def publish_manifest(self) -> Manifest:
        """Publish the list of all that is committed now, at the cost of what no manifest lists yet. Where
        there is nothing, the manifest stays what it is.

        Returns:
            The manifest. `CacheReader.open(path, manifest.digest)` reads exactly what it lists.

        Raises:
            StoreFormatError: nothing is committed yet.
            StoreWriteError: the place cannot be written.
        """
        with writing("a manifest", self.path):
            return publish_newest(self.root, self._plans)

    def put_teacher_files(self, files: Mapping[str, bytes]) -> None:
        """Keep files of the teacher (config, tokenizer, parts of its sidecar) in teacher/, and list them.

        A name's first content stays.
        """
        for name in files:
            check_id(name, FILE_NAME, "teacher file")
        with writing("teacher files", self.path):
            for name, data in files.items():
                self.root.publish(f"teacher/{name}", data)
            stamps = {name: self._stamp(f"teacher/{name}", len(data)) for name, data in sorted(files.items())}
            data = seal({**header("teacher"), "files": {name: list(s) for name, s in stamps.items()}})
            self.root.publish(f"TEACHER-{digest(data)}.json", data)

    def sidecar(self) -> dict[str, tuple[str, Stamp]]:
        """Part of the teacher's sidecar -> (file in teacher/, its stamp), whichever run put it there."""
        return sidecar_files(self.root, teacher_listings(self.root))

    def basis(self, dtype: str) -> Basis | None:
        """The basis of final states stored as `dtype`, klt4 or klt6; None before one is put in teacher/."""
        return load_basis(self.root, dtype, self.identity) if dtype in self.sidecar() else None

    def add_provenance(self, record: Mapping[str, Any]) -> str:
        """Keep a record of one run: its command line, versions, seconds.

        Args:
            record: what JSON can hold. Credentials in it are replaced by `***`.

        Returns:
            The record's id.

        Raises:
            StoreWriteError: the place cannot be written.
        """
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        with writing("provenance", self.path):
            # Through JSON once, so that what is sealed is what a reader parses.
            record = for_record(json.loads(json.dumps(dict(record), allow_nan=False)))
            data = seal({**header("provenance"), "id": name, "record": record})
            self.root.publish(f"provenance/{name}.json", data)
        return name

    def provenance(self) -> list[dict[str, Any]]:
        """The records of all runs, oldest first."""
        return [read_provenance(self.root, name) for name in provenance_names(self.root)]

    def unrecorded_runs(self) -> list[dict[str, Any]]:
        """What runs spent that left no provenance record (they were stopped, or are at work), in the fields
        of one.
        """
        return [
            {
                "command": "generate (stopped, or still at work)",
                "run": run.id,
                "request": {"engine": self.identity.engine},
                "tokens": run.tokens,
                "engine_seconds": run.engine_seconds,
                "capture_seconds": run.capture_seconds,
            }
            for run in unrecorded(self.inventory().runs.values(), self.provenance())
        ]

    def _stamp(self, name: str, size: int) -> Stamp:
        """Size and hash of a file, by reading back what lies there: another writer may have been first, whose
        basis may have up to twice as many coordinates.
        """
        self.root.fetch({name: max(2 * size, MAX_RECORD_BYTES)})
        with self.root.naming():
            return hash_file(self.root.local(name))

    def _has(self, spec: GroupSpec | None, task: Task) -> bool:
        """Is this group (None: are the samples) of the task committed."""
        return self.root.exists(commit_name(SAMPLES if spec is None else group_id(spec), task.id))

    def _records(self, group: str) -> dict[str, CommitRecord]:
        """task id -> record, of all tasks that have the group."""
        tasks = committed_tasks(self.root, group)
        self.root.fetch({commit_name(group, task): MAX_RECORD_BYTES for task in tasks})
        return {task: read_commit(self.root, group, task) for task in tasks}

    def _check_samples(self, task: Task, samples: Sequence[Sample]) -> None:
        if tuple(sample.id for sample in samples) != task.sample_ids:
            raise ValueError(f"these are not the samples of task {task.id}, in its order")
        for sample in samples:
            if int(sample.tokens.max()) >= self.identity.vocab_size:
                raise ValueError(f"sample {sample.id} has token ids outside the teacher's vocabulary")

    def _write_private(
        self,
        bundle: str,
        folder: Path,
        task: Task,
        packed: Mapping[GroupSpec, tuple[Mapping[str, Any], Stats]],
        samples: Sequence[Sample] | None,
    ) -> list[CommitRecord]:
        """Fill a bundle, make it durable, and hash it by reading it back. Samples come last."""
        contents: list[tuple[GroupSpec | None, str, Stats]] = []
        documents: tuple[tuple[str, ...], ...] = ()
        for spec, (arrays, stats) in packed.items():
            group = group_id(spec)
            extent = Extent.of(task.lengths, stats, self.identity)
            attributes = {"task": task.id, "group": group, "spec": spec.to_json()}
            write_group(folder / group, attributes, kind_of(spec).layouts(spec, extent), arrays)
            contents.append((spec, group, stats))
        if samples is not None:
            write_new(folder / SAMPLES_FILE, samples_to_bytes(samples))
            contents.append((None, SAMPLES, {}))
            documents = tuple(sample.documents for sample in samples)
        settled = self.root.settle(bundle)
        return [
            CommitRecord(
                task=task.id,
                group=group,
                spec=spec,
                bundle=bundle,
                rows=task.rows,
                samples=len(task.lengths),
                files={file: hash_file(settled / file) for file in files_of(spec, group)},
                stats=stats,
                documents=documents if spec is None and any(documents) else (),
            )
            for spec, group, stats in contents
        ]
