"""One committed task: its files checked on first touch, its features read sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.format.arrays import ChunkCache
from featurestore.format.codec import row_starts
from featurestore.format.columns import Extent
from featurestore.format.kinds.table import GroupCodes, covers, kind_of, parts
from featurestore.format.plan import Task
from featurestore.format.records import SAMPLES_FILE, CommitRecord
from featurestore.format.schema import GroupFeatures, GroupSpec, Sample, TeacherIdentity
from featurestore.format.sidecar import load_basis
from featurestore.format.tables import samples_from_bytes
from featurestore.identity import SAMPLES
from featurestore.storage.protocol import PARTS, Root


class Group:
    """The arrays of one column group of one task."""

    def __init__(
        self,
        root: Root,
        record: CommitRecord,
        task: Task,
        identity: TeacherIdentity,
        cache: ChunkCache | None = None,
    ) -> None:
        spec = record.spec
        assert spec is not None
        self._kind = kind_of(spec)
        self._rows = row_starts(np.asarray(task.lengths)).tolist()
        extent = Extent.of(task.lengths, record.stats, identity)
        directory = root.local(f"{bundle_name(record)}/{record.group}")
        needed = self._kind.basis(spec)
        basis = None if needed is None else load_basis(root, needed, identity)
        self._read = self._kind.open(spec, directory, extent, cache, basis)

    def read(self, position: int) -> GroupFeatures:
        """The features of the sample at `position` of the task."""
        return self._kind.decode(self.codes(position))

    def codes(self, position: int) -> GroupCodes:
        """The same as stored."""
        return self._read(position, self._rows[position], self._rows[position + 1])


class Bundle:
    """All that is committed of one task. Opens a group when it is first asked for.

    `verified` is shared: the (task, group) pairs whose files were hashed already, so that a bundle which
    is closed and opened again is not hashed again. `cache` holds unpacked chunks of all bundles.
    """

    def __init__(
        self,
        root: Root,
        identity: TeacherIdentity,
        task: Task,
        records: Mapping[str, CommitRecord],
        verified: set[tuple[str, str]],
        cache: ChunkCache,
    ) -> None:
        self.task = task
        self.records = records
        self._root = root
        self._identity = identity
        self._verified = verified
        self._cache = cache
        self._groups: dict[str, Group] = {}
        self._serving: dict[GroupSpec, list[tuple[CommitRecord, GroupSpec]]] = {}
        self._samples: list[Sample] | None = None

    def samples(self) -> list[Sample]:
        """Tokens and masks of the task's samples, in order."""
        if self._samples is None:
            if SAMPLES not in self.records:
                raise MissingFeatureError(f"the samples of task {self.task.id} are not committed")
            self._verify(self.records[SAMPLES])
            self._samples = load_samples(self._root, self.records[SAMPLES], self.task)
        return self._samples

    def features(self, position: int, want: GroupSpec) -> GroupFeatures:
        """The features of one sample, from a group that covers `want`, narrowed to it."""
        return kind_of(want).decode(self.codes(position, want))

    def codes(self, position: int, want: GroupSpec) -> GroupCodes:
        """The same as stored, cut to `want` (see `GroupKind.cut`)."""
        parts = [self._part(record, part, position) for record, part in self._records(want)]
        return kind_of(want).join(parts, want)

    def _part(self, record: CommitRecord, part: GroupSpec, position: int) -> GroupCodes:
        try:
            codes = self._read(record, position)
        except (CorruptionError, StoreFormatError):
            if not self._root.keeps_copies:
                raise
            # The mirror may have been emptied or damaged since it was verified: verify once more, and read.
            self._groups.pop(record.group, None)
            self._verified.discard((self.task.id, record.group))
            with self._root.naming():
                codes = self._read(record, position)
        assert record.spec is not None
        sample = self.samples()[position]
        return kind_of(part).cut(codes, record.spec, part, sample, self._identity)

    def _records(self, want: GroupSpec) -> list[tuple[CommitRecord, GroupSpec]]:
        if want not in self._serving:
            records = serving(self.records, want)
            if not records:
                raise MissingFeatureError(f"task {self.task.id} has no column group that serves {want}")
            self._serving[want] = records
        return self._serving[want]

    def _read(self, record: CommitRecord, position: int) -> GroupCodes:
        if record.group not in self._groups:
            self._verify(record)
            group = Group(self._root, record, self.task, self._identity, self._cache)
            self._groups[record.group] = group
        return self._groups[record.group].codes(position)

    def warm(self, wants: Iterable[GroupSpec]) -> None:
        """Have the files of the samples and of these groups at hand and verified; nothing is decoded.

        May run in one thread while another reads.
        """
        records = {one.group: one for want in wants for one, _ in serving(self.records, want)}
        for record in (self.records[SAMPLES], *records.values()):
            if (self.task.id, record.group) not in self._verified:
                self._verify(record)

    def _verify(self, record: CommitRecord) -> None:
        key = (self.task.id, record.group)
        check_record(self._root, record, self.task, deep=key not in self._verified)
        self._verified.add(key)


def bundle_name(record: CommitRecord) -> str:
    """parts/<bundle>, the path of a bundle in its store."""
    return f"{PARTS}/{record.bundle}"


def check_extent(record: CommitRecord, task: Task) -> None:
    """StoreFormatError unless the record has the rows and samples of its task."""
    if record.rows != task.rows or record.samples != len(task.lengths):
        raise StoreFormatError(f"commit/{record.group}/{record.task}.json: other sizes than the plan's task")


def check_record(root: Root, record: CommitRecord, task: Task, deep: bool = True) -> None:
    """CorruptionError unless every file of the record has its size and, if `deep`, its committed hash."""
    check_extent(record, task)
    root.check({f"{bundle_name(record)}/{name}": stamp for name, stamp in record.files.items()}, deep)


def read_samples(root: Root, record: CommitRecord, task: Task) -> list[Sample]:
    """The samples of a task from its committed bundle, checked."""
    check_record(root, record, task)
    return load_samples(root, record, task)


def load_samples(root: Root, record: CommitRecord, task: Task) -> list[Sample]:
    """The samples of a task whose file was checked; they have to hash to the plan's ids in any case."""
    name, (size, _) = f"{bundle_name(record)}/{SAMPLES_FILE}", record.files[SAMPLES_FILE]
    samples = root.load(name, lambda data, where: samples_from_bytes(data, task, where), size)
    if not record.documents:
        return samples
    return [replace(sample, documents=keys) for sample, keys in zip(samples, record.documents, strict=True)]


def serving(records: Mapping[str, CommitRecord], want: GroupSpec) -> list[tuple[CommitRecord, GroupSpec]]:
    """The records that serve a request, each with the part of it that it is for: the very group, else the one
    with the fewest bytes that covers it, else groups that do so together. None where nothing does.
    """
    known = [(record, record.spec) for record in records.values() if record.spec is not None]
    served = []
    for part in parts([spec for _, spec in known], want):
        covering = [(record, spec) for record, spec in known if covers(spec, part)]
        served.append((min(covering, key=lambda one: (one[1] != part, one[0].size))[0], part))
    return served
