"""What one manifest lists, by the index of a sample: for readers. Of either format version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Set
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from featurestore.catalogue.columns import Array, empty
from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.manifest import Manifest
from featurestore.catalogue.segment import Segment, keys_of
from featurestore.catalogue.views import Indices
from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, FlatManifest, commit_name, read_commit
from featurestore.format.schema import GroupSpec
from featurestore.format.tables import read_plan
from featurestore.identity import SAMPLES
from featurestore.storage.files import MAX_RECORD_BYTES
from featurestore.storage.protocol import Root

# (segment, place of the sample in it)
Place = tuple[int, int]


class Catalogue(ABC):
    """The samples of a manifest, in its order, and the shards (tasks) that hold them.

    Attributes:
        groups: column group id -> spec.
        teacher: names of the teacher listings.
        spec: digest of the SPEC.json that the manifest was made for.
    """

    groups: Mapping[str, GroupSpec]
    teacher: tuple[str, ...]
    spec: str

    @property
    @abstractmethod
    def segments(self) -> int:
        """How many segments there are."""

    @abstractmethod
    def segment(self, number: int) -> Segment:
        """One of them, checked."""

    @abstractmethod
    def records(self, number: int, row: int) -> dict[str, CommitRecord]:
        """Group id or "samples" -> commit record, of a task."""

    @abstractmethod
    def covered(self, serving: Set[str]) -> bool:
        """Whether each task has at least one of these groups."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Positions of all samples."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Positions of the longest sample."""

    @abstractmethod
    def _counts(self) -> tuple[list[int], list[int]]:
        """Samples, and tasks, of each segment."""

    def documents(self, number: int) -> tuple[Array, Array]:
        """Of a segment: where the keys of each sample begin, int64 [N + 1], and the keys, uint8 [., 8]."""
        columns = self.segment(number).columns
        return columns["document_start"], columns["document"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> Indices:
        """int64 [segments + 1]: index of the first sample of each segment, and the number of samples."""
        return np.cumsum([0, *self._counts()[0]], dtype=np.int64)

    @cached_property
    def task_starts(self) -> Indices:
        """int64 [segments + 1]: number of the first shard of each segment, and the number of shards."""
        return np.cumsum([0, *self._counts()[1]], dtype=np.int64)

    def place(self, index: int) -> Place:
        """Where a sample is; IndexError for an index that is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, self.segment(number).kept[index - int(self.starts[number])]

    def index(self, number: int, place: int) -> int:
        """The inverse of `place`, for a sample that is not dropped."""
        dropped = self.segment(number).dropped
        return int(self.starts[number]) + place - int(np.searchsorted(dropped, place))

    def shard(self, index: int) -> int:
        """The number of the shard that holds a sample."""
        number, place = self.place(index)
        return int(self.task_starts[number]) + self.segment(number).row_of(place)

    def row(self, shard: int) -> tuple[int, int]:
        """(segment, row) of a shard."""
        number = int(np.searchsorted(self.task_starts, shard, side="right")) - 1
        return number, shard - int(self.task_starts[number])

    def find(self, ids: Array) -> Indices:
        """int64 [m]: the indices of samples by their ids, uint8 [m, 16]; -1 where there is none."""
        found = np.full(len(ids), -1, np.int64)
        for number in range(self.segments):
            segment = self.segment(number)
            places = segment.find(ids)
            here = np.flatnonzero((places >= 0) & ~np.isin(places, segment.dropped))
            found[here] = self.starts[number] + places[here] - np.searchsorted(segment.dropped, places[here])
        return found

    def smallest(self, count: int, among: Container[int]) -> list[int]:
        """The samples with the smallest ids, ascending by index: at most `count`, all of them `among`."""
        found: list[tuple[bytes, int]] = []
        for number in range(self.segments):
            segment = self.segment(number)
            dropped = set(segment.dropped.tolist())
            places = (place for place in map(int, segment.columns["key_place"]) if place not in dropped)
            chosen = ((place, i) for place in places if (i := self.index(number, place)) in among)
            found += [(bytes(segment.columns["sample"][p]), i) for p, i in islice(chosen, count)]
        return sorted(index for _, index in sorted(found)[:count])

    def columns(self, name: str) -> Iterator[Array]:
        """A column with one value per sample ("length", "sample"), segment by segment, in order."""
        for number in range(self.segments):
            segment = self.segment(number)
            column = segment.columns[name]
            yield np.delete(column, segment.dropped, axis=0) if len(segment.dropped) else column


class SegmentCatalogue(Catalogue):
    """Of a manifest of version 2: nothing is read of a segment before it is touched."""

    def __init__(self, root: Root, manifest: Manifest) -> None:
        self.groups, self.teacher, self.spec = manifest.groups, manifest.teacher, manifest.spec
        self._files = SegmentFiles(root, manifest.segments, manifest.groups)
        self._held = {groups for ref in manifest.segments for groups in ref.held}

    @property
    def segments(self) -> int:
        return len(self._files)

    def segment(self, number: int) -> Segment:
        return self._files.checked(number)

    def records(self, number: int, row: int) -> dict[str, CommitRecord]:
        return self.segment(number).records(row, self.groups)

    def covered(self, serving: Set[str]) -> bool:
        return all(not serving.isdisjoint(groups) for groups in self._held)

    @property
    def rows(self) -> int:
        return sum(ref.rows for ref in self._files.refs)

    @property
    def longest(self) -> int:
        return max(ref.longest for ref in self._files.refs)

    def _counts(self) -> tuple[list[int], list[int]]:
        return [ref.samples for ref in self._files.refs], [ref.tasks for ref in self._files.refs]


class FlatCatalogue(Catalogue):
    """Of a manifest of version 1: all its plans are read at once, as one segment in memory, and its commit
    records when they are needed.
    """

    def __init__(self, root: Root, manifest: FlatManifest) -> None:
        self.groups, self.teacher, self.spec = manifest.groups, manifest.teacher, manifest.spec
        self._root, self._manifest = root, manifest
        self._tasks = _tasks_of(root, manifest)
        self._segment = Segment(_columns(self._tasks), str(root.location))

    @property
    def segments(self) -> int:
        return 1

    def segment(self, number: int) -> Segment:
        return self._segment

    def records(self, number: int, row: int) -> dict[str, CommitRecord]:
        task = self._tasks[row].id
        named = self._manifest.tasks[task]
        self._root.fetch({commit_name(group, task): MAX_RECORD_BYTES for group in named})
        return {group: read_commit(self._root, group, task, seal) for group, seal in named.items()}

    def covered(self, serving: Set[str]) -> bool:
        return all(serving & set(named) for named in self._manifest.tasks.values())

    def documents(self, number: int) -> tuple[Array, Array]:
        """One commit record is read for each task."""
        return self._documents

    @property
    def rows(self) -> int:
        return int(np.delete(self._segment.columns["length"], self._segment.dropped).sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        return int(self._segment.columns["length"].max())

    def _counts(self) -> tuple[list[int], list[int]]:
        return [self._segment.places - len(self._segment.dropped)], [self._segment.tasks]

    @cached_property
    def _documents(self) -> tuple[Array, Array]:
        self._root.fetch({commit_name(SAMPLES, task.id): MAX_RECORD_BYTES for task in self._tasks})
        counts: list[int] = [0]
        keys: list[str] = []
        for task in self._tasks:
            seal = self._manifest.tasks[task.id][SAMPLES]
            record = read_commit(self._root, SAMPLES, task.id, seal)
            if record.rows != task.rows or record.samples != len(task.lengths):
                raise StoreFormatError(f"{commit_name(SAMPLES, task.id)}: other sizes than the plan's task")
            for known in record.documents or ((),) * len(task.lengths):
                counts.append(len(known))
                keys += known
        raw = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 8)
        return np.cumsum(counts, dtype=np.int64), raw


def catalogue_of(root: Root, manifest: Manifest | FlatManifest) -> Catalogue:
    """What a manifest lists, whatever its version."""
    if isinstance(manifest, Manifest):
        return SegmentCatalogue(root, manifest)
    return FlatCatalogue(root, manifest)


def _tasks_of(root: Root, manifest: FlatManifest) -> list[Task]:
    """The manifest's tasks, in the order of their plan files."""
    known: dict[str, Task] = {}
    for name in manifest.plans:
        known.update((task.id, task) for task in read_plan(root, name))
    lost = [task for task in manifest.tasks if task not in known]
    if lost:
        raise CorruptionError(f"{root.location}: no plan file has task {lost[0]}, which the manifest lists")
    return [task for task in known.values() if task.id in manifest.tasks]


def _columns(tasks: list[Task]) -> dict[str, Any]:
    """The columns of a segment, as far as plans tell them."""
    columns: dict[str, Any] = {name: empty(name) for name in ("group", "document", "plan")}
    ids = [sample for task in tasks for sample in task.sample_ids]
    sample = np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, 16)
    first = np.zeros(len(sample), bool)
    first[np.unique(np.ascontiguousarray(sample).view("V16").reshape(-1), return_index=True)[1]] = True
    key, place = keys_of(sample)
    return {
        **columns,
        "task": np.frombuffer(bytes.fromhex("".join(task.id for task in tasks)), np.uint8).reshape(-1, 8),
        "sample_start": np.cumsum([0, *(len(task.lengths) for task in tasks)], dtype=np.int64),
        "sample": sample,
        "length": np.array([length for task in tasks for length in task.lengths], np.int32),
        "key": key,
        "key_place": place.astype(np.int32),
        # Two generators that planned at the same moment can have put one sample into two tasks.
        "dropped": np.flatnonzero(~first).astype(np.int32),
    }
