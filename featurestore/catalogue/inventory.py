"""What a store has: listed by its newest manifest, committed since, and planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.folding import ListedTask
from featurestore.catalogue.manifest import GroupTotals, Manifest, grown, head_names, latest_runs, read_head
from featurestore.catalogue.pending import Pending, pending_bundles, read_pending
from featurestore.errors import CorruptionError
from featurestore.format.directory import committed_groups, committed_tasks, plan_names
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, RunCost, commit_name, read_commit_and_digest
from featurestore.format.schema import GroupSpec
from featurestore.format.tables import read_plan
from featurestore.storage.files import MAX_RECORD_BYTES
from featurestore.storage.protocol import Root

Plans = dict[str, list[Task]]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """One look at a store, at the cost of what no manifest lists yet.

    base: the fullest manifest of version 2; None in a store that has none, of which then all records and
    plans are read. loose: task id -> what is committed of it and not in base. plans: the plan files with a
    task that is not in base. heads, markers: what was looked at.
    """

    location: str | Path
    base: Manifest | None
    segments: SegmentFiles
    loose: Mapping[str, ListedTask]
    plans: Mapping[str, list[Task]]
    heads: tuple[str, ...] = ()
    markers: tuple[Pending, ...] = ()
    _rows: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, GroupSpec]:
        """Spec of every column group that at least one task has."""
        found = dict(self.base.groups) if self.base else {}
        for record in self.loose_records():
            if record.spec is not None:
                found[record.group] = record.spec
        return dict(sorted(found.items()))

    @property
    def totals(self) -> dict[str, GroupTotals]:
        """Group id or "samples" -> sums over all its records."""
        return grown(self.base.totals if self.base else {}, self.loose_records())

    @property
    def runs(self) -> dict[str, RunCost]:
        """What each run had spent at its last record."""
        costs = [record.run for record in self.loose_records() if record.run is not None]
        return latest_runs([*(self.base.runs.values() if self.base else ()), *costs])

    @property
    def lengths(self) -> dict[int, int]:
        """Samples of all tasks whose samples are committed, by the power of two below their length."""
        new = [one.task for one in self.loose.values() if one.complete]
        return histogram(self.base.lengths if self.base else {}, new)

    @property
    def unfinished(self) -> list[Task]:
        """The planned tasks whose samples are not committed."""
        planned = self.planned
        listed = self.rows(planned)
        done = {task for task, one in self.loose.items() if one.complete}
        return [task for task in planned.values() if task.id not in listed and task.id not in done]

    @property
    def planned(self) -> dict[str, Task]:
        """The tasks of the plan files that have one which is not listed, in order."""
        return {task.id: task for _, tasks in sorted(self.plans.items()) for task in tasks}

    def loose_records(self) -> Iterable[CommitRecord]:
        """The records that no manifest lists."""
        return (record for one in self.loose.values() for record, _ in one.records.values())

    def tasks(self) -> dict[str, Task]:
        """Every task that is planned or committed, by id. Reads the whole store's list."""
        listed = (
            self.segments.checked(number).task(row)
            for number in range(len(self.segments))
            for row in range(self.segments.refs[number].tasks)
        )
        loose = {one.task.id: one.task for one in self.loose.values()}
        return {**{task.id: task for task in listed}, **self.planned, **loose}

    def task(self, task_id: str) -> Task | None:
        """A planned or committed task."""
        if task_id in self.loose:
            return self.loose[task_id].task
        if place := self.rows([task_id]).get(task_id):
            return self.segments.checked(place[0]).task(place[1])
        return self.planned.get(task_id)

    def rows(self, tasks: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Of the tasks that base lists: (number of the segment, row)."""
        tasks = list(tasks)
        wanted = [task for task in dict.fromkeys(tasks) if task not in self._rows]
        ids = np.frombuffer(bytes.fromhex("".join(wanted)), np.uint8).reshape(-1, 8)
        self._rows.update(dict.fromkeys(wanted))
        for number in range(len(self.segments) if wanted else 0):
            rows = self.segments.glance(number).rows_of(ids)
            for place in np.flatnonzero(rows >= 0).tolist():
                self._rows[wanted[place]] = (number, int(rows[place]))
        return {task: place for task in tasks if (place := self._rows[task]) is not None}

    def holding(self, samples: Iterable[str]) -> dict[str, Task]:
        """The known tasks that hold these samples, by id: listed ones first, then planned ones in order.

        Costs a look into each segment's index and plan files that are not all listed.
        """
        wanted = list(dict.fromkeys(samples))
        ids = np.frombuffer(bytes.fromhex("".join(wanted)), np.uint8).reshape(-1, 16)
        found: dict[str, Task] = {}
        for number in range(len(self.segments) if wanted else 0):
            segment = self.segments.glance(number)
            places = segment.find(ids)
            for row in sorted({segment.row_of(place) for place in places[places >= 0].tolist()}):
                task = self.segments.checked(number).task(row)
                found[task.id] = task
                self._rows[task.id] = (number, row)
        known = set(wanted)
        others = [*self.planned.values(), *(one.task for one in self.loose.values())]
        found.update((task.id, task) for task in others if not known.isdisjoint(task.sample_ids))
        return found

    def committed(self, tasks: Iterable[str]) -> dict[str, set[str]]:
        """Group id or "samples" -> those of these tasks that have it."""
        found: dict[str, set[str]] = {}
        tasks = list(tasks)
        for task, (number, row) in self.rows(tasks).items():
            for group in self.segments.checked(number).record_digests(row):
                found.setdefault(group, set()).add(task)
        for task in tasks:
            for group in self.loose[task].records if task in self.loose else ():
                found.setdefault(group, set()).add(task)
        return found


def take_stock(root: Root, plans: Plans, everything: bool = False) -> Inventory:
    """Look at a store.

    plans: contents of plan files by name, as far as they are known; what is read is added. everything: read
    all commit records, also those that a manifest lists or no marker names.

    Raises CorruptionError for a damaged record, plan, marker or manifest.
    """
    # Markers before heads: what a publisher removes from the first is in the second by then.
    markers = read_pending(root, pending_bundles(root))
    heads = head_names(root)
    manifests = [read_head(root, name) for name in heads]
    base = manifests[-1] if manifests and not everything else None
    segments = SegmentFiles(root, base.segments if base else (), base.groups if base else {})
    inventory = Inventory(location=root.location, base=base, segments=segments, loose={}, plans={})
    opened = _open_plans(root, plans, segments)
    if base is None:
        known = {task.id: task for _, tasks in sorted(opened.items()) for task in tasks}
        known |= {marker.task.id: marker.task for marker in markers}
        for manifest in manifests:
            files = SegmentFiles(root, manifest.segments, manifest.groups)
            known |= Inventory(
                location=root.location, base=manifest, segments=files, loose={}, plans={}
            ).tasks()
        loose = _all_records(root, known)
    else:
        loose = _of_markers(root, markers)
        for manifest in manifests[:-1]:
            _add_other(root, loose, base, manifest)
        loose = _without_listed(inventory, loose)
    return Inventory(
        location=root.location,
        base=base,
        segments=segments,
        loose=loose,
        plans=opened,
        heads=tuple(heads),
        markers=tuple(markers),
    )


def _open_plans(root: Root, plans: Plans, segments: SegmentFiles) -> Plans:
    """The plan files that no segment names as listed whole; `plans` forgets the others."""
    closed = {bytes(plan).hex() for n in range(len(segments)) for plan in segments.glance(n).columns["plan"]}
    opened: Plans = {}
    for name in plan_names(root):
        if name.removeprefix("plan-").removesuffix(".parquet") not in closed:
            # Another thread may be here and forget what has been closed meanwhile.
            opened[name] = plans.get(name) or read_plan(root, name)
    plans.update(opened)
    for name in plans.keys() - opened.keys():
        plans.pop(name, None)
    return opened


def _of_markers(root: Root, markers: Iterable[Pending]) -> dict[str, ListedTask]:
    wanted = {commit_name(group, m.task.id): (group, m.task) for m in markers for group in m.groups}
    root.fetch(dict.fromkeys(wanted, MAX_RECORD_BYTES))
    found: dict[str, ListedTask] = {}
    for name, (group, task) in wanted.items():
        if root.local(name).exists():
            _add(found, task, group, read_commit_and_digest(root, group, task.id))
    return found


def _all_records(root: Root, known: Mapping[str, Task]) -> dict[str, ListedTask]:
    found: dict[str, ListedTask] = {}
    for group in committed_groups(root):
        tasks = committed_tasks(root, group)
        root.fetch({commit_name(group, task): MAX_RECORD_BYTES for task in tasks})
        for task in tasks:
            if task not in known:
                raise CorruptionError(f"{root.location}: no plan file has task {task}, which is committed")
            _add(found, known[task], group, read_commit_and_digest(root, group, task))
    return found


def _add(found: dict[str, ListedTask], task: Task, group: str, record: tuple[CommitRecord, str]) -> None:
    before = found[task.id].records if task.id in found else {}
    if record[0].samples != len(task.lengths) or record[0].rows != task.rows:
        raise CorruptionError(f"commit/{group}/{task.id}.json: other sizes than the task has")
    found[task.id] = ListedTask(task=task, records={**before, group: record})


def _add_other(root: Root, loose: dict[str, ListedTask], base: Manifest, other: Manifest) -> None:
    """What a manifest lists that was published at the same moment as base."""
    shared = {ref.digest for ref in base.segments}
    files = SegmentFiles(root, [ref for ref in other.segments if ref.digest not in shared], other.groups)
    for number in range(len(files)):
        segment = files.checked(number)
        for row in range(segment.tasks):
            task, digests = segment.task(row), segment.record_digests(row)
            for group, record in segment.records(row, other.groups).items():
                _add(loose, task, group, (record, digests[group]))


def _without_listed(inventory: Inventory, loose: Mapping[str, ListedTask]) -> dict[str, ListedTask]:
    left = dict(loose)
    for task, (number, row) in inventory.rows(loose).items():
        listed = inventory.segments.checked(number).record_digests(row)
        records = {group: record for group, record in loose[task].records.items() if group not in listed}
        if records:
            left[task] = ListedTask(task=loose[task].task, records=records)
        else:
            del left[task]
    return left


def listed_groups(inventory: Inventory, task: str) -> set[str]:
    """Group ids and "samples" that base lists of a task."""
    place = inventory.rows([task]).get(task)
    return set() if place is None else set(inventory.segments.checked(place[0]).record_digests(place[1]))


def histogram(counts: Mapping[int, int], tasks: Iterable[Task]) -> dict[int, int]:
    """The counts of samples by the power of two below their length, with those of more tasks."""
    found = dict(counts)
    for task in tasks:
        for length in task.lengths:
            power = length.bit_length() - 1
            found[power] = found.get(power, 0) + 1
    return dict(sorted(found.items()))
