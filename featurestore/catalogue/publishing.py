"""A new manifest out of the newest one and of what was committed since, at the cost of the latter.

Everything is published before anything is removed: segments, then the manifest that names them, then its
head; only then the heads of what it was made from, and the markers of records that it lists. So a kill at any
point leaves a store in which the next publication lists everything. Two that run at the same moment leave two
heads, each of a valid manifest; the one that ends later sees both, and lists what both do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from featurestore.catalogue.columns import Array, to_bytes
from featurestore.catalogue.files import ref_of
from featurestore.catalogue.folding import (
    ListedTask,
    NewColumns,
    columns_of,
    finished,
    joined,
    pieces,
    taken,
    to_join,
)
from featurestore.catalogue.inventory import Inventory, Plans, histogram, listed_groups, take_stock
from featurestore.catalogue.manifest import (
    Manifest,
    SegmentRef,
    grown,
    head_bytes,
    head_names,
    latest_runs,
    segment_name,
)
from featurestore.catalogue.segment import Segment
from featurestore.errors import StoreFormatError
from featurestore.format.directory import manifest_name, read_spec, teacher_listings
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord
from featurestore.identity import digest
from featurestore.storage.protocol import HEADS, Root

ATTEMPTS = 8

Part = SegmentRef | NewColumns


def publish_newest(root: Root, plans: Plans, everything: bool = False) -> Manifest:
    """Publish the manifest of all that is committed now; see `take_stock` for the arguments.

    StoreFormatError when nothing is committed.
    """
    for _ in range(ATTEMPTS):
        inventory = take_stock(root, plans, everything)
        manifest = _publish(root, inventory)
        if head_names(root) == [manifest.head]:
            break
    return manifest


def _publish(root: Root, inventory: Inventory) -> Manifest:
    listings = tuple(teacher_listings(root))
    base = inventory.base
    files: dict[str, bytes] = {}
    if base is not None and not _new(inventory):
        manifest = replace(base, teacher=listings)
    else:
        manifest, files = fold(inventory, read_spec(root)[1], listings)
    for name, data in files.items():
        root.publish(name, data)
    if base is None or manifest != base:
        root.publish(manifest_name(manifest.digest), manifest.to_bytes())
        root.publish(f"{HEADS}/{manifest.head}", head_bytes(manifest.digest))
    for head in inventory.heads:
        if head != manifest.head:
            root.remove(f"{HEADS}/{head}", lambda _: False)
    new = _new(inventory)
    inventory.rows(marker.task.id for marker in inventory.markers)
    for marker in inventory.markers:
        task = marker.task.id
        listed = set(new[task].records) if task in new else set()
        if listed.issuperset(marker.groups) or (listed | listed_groups(inventory, task)).issuperset(
            marker.groups
        ):
            root.remove(marker.name, lambda _: False)
    return manifest


def fold(
    inventory: Inventory, spec_digest: str, listings: Sequence[str]
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of an inventory, and the segment files that it needs by name. Writes nothing.

    StoreFormatError when nothing is committed.
    """
    base, new = inventory.base, _new(inventory)
    if base is None and not new:
        raise StoreFormatError(
            f"nothing is committed in {inventory.location} yet, so there is nothing to list"
        )
    rows = inventory.rows(new)
    moved = {task: inventory.segments.checked(number) for task, (number, _) in rows.items()}
    whole = {
        task: replace(one, records={**_listed_records(inventory, moved[task], rows[task][1]), **one.records})
        if task in rows
        else one
        for task, one in new.items()
    }
    listed = _in_order(whole, inventory.planned)
    parts = _kept_parts(inventory, rows)
    dropped = _dropped(inventory, listed, rows)
    parts += _new_parts(listed, dropped, _closed_plans(inventory, new))
    refs, files = _stored(_fewer(parts, inventory))
    records = [record for one in new.values() for record, _ in one.records.values()]
    runs = [record.run for record in records if record.run is not None]
    specs = {record.group: record.spec for record in records if record.spec is not None}
    manifest = Manifest(
        spec=spec_digest,
        teacher=tuple(listings),
        groups=dict(sorted({**(base.groups if base else {}), **specs}.items())),
        segments=tuple(refs),
        totals=grown(base.totals if base else {}, records),
        lengths=histogram(base.lengths if base else {}, [o.task for t, o in new.items() if t not in rows]),
        runs=latest_runs([*(base.runs.values() if base else ()), *runs]),
    )
    return manifest, files


def _new(inventory: Inventory) -> dict[str, ListedTask]:
    """What base does not list and a manifest can: of tasks whose samples are committed."""
    rows = inventory.rows(inventory.loose)
    return {task: one for task, one in inventory.loose.items() if one.complete or task in rows}


def _listed_records(inventory: Inventory, segment: Segment, row: int) -> dict[str, tuple[CommitRecord, str]]:
    assert inventory.base is not None
    digests = segment.record_digests(row)
    return {g: (record, digests[g]) for g, record in segment.records(row, inventory.base.groups).items()}


def _in_order(new: Mapping[str, ListedTask], planned: Mapping[str, Task]) -> list[ListedTask]:
    """In the order of the plans, then by id."""
    place = {task: number for number, task in enumerate(planned)}
    return [new[task] for task in sorted(new, key=lambda task: (place.get(task, len(place)), task))]


def _kept_parts(inventory: Inventory, moved: Mapping[str, tuple[int, int]]) -> list[Part]:
    """The segments of base, those from which tasks move without these."""
    gone: dict[int, list[int]] = {}
    for number, row in moved.values():
        gone.setdefault(number, []).append(row)
    parts: list[Part] = []
    for number, ref in enumerate(inventory.segments.refs):
        if number not in gone:
            parts.append(ref)
        elif len(gone[number]) < ref.tasks:
            segment = inventory.segments.checked(number)
            parts.append(taken(segment, np.delete(np.arange(segment.tasks), gone[number])))
    return parts


def _dropped(
    inventory: Inventory, listed: Sequence[ListedTask], moved: Mapping[str, tuple[int, int]]
) -> Array:
    """bool, per sample of these tasks: whether the manifest has it from a task before."""
    names = [sample for one in listed for sample in one.task.sample_ids]
    ids = np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 16)
    there = np.zeros(len(ids), bool)
    for number in range(len(inventory.segments)):
        segment = inventory.segments.glance(number)
        places = segment.find(ids)
        here = np.flatnonzero(places >= 0)
        if not len(here):
            continue
        segment = inventory.segments.checked(number)
        places = segment.find(ids)
        rows = np.searchsorted(segment.columns["sample_start"], places, side="right") - 1
        leaving = [row for n, row in moved.values() if n == number]
        there |= (places >= 0) & ~np.isin(places, segment.dropped) & ~np.isin(rows, leaving)
    first = np.zeros(len(ids), bool)
    _, index = np.unique(np.ascontiguousarray(ids).view("V16").reshape(-1), return_index=True)
    first[index] = True
    dropped: Array = there | ~first
    return dropped


def _closed_plans(inventory: Inventory, new: Mapping[str, ListedTask]) -> list[str]:
    """Digests of the plan files all of whose tasks are listed from now on."""
    closed = []
    for name, tasks in inventory.plans.items():
        left = [task.id for task in tasks if task.id not in new]
        if len(inventory.rows(left)) == len(set(left)):
            closed.append(name.removeprefix("plan-").removesuffix(".parquet"))
    return closed


def _new_parts(listed: Sequence[ListedTask], dropped: Array, closed: Sequence[str]) -> list[Part]:
    parts: list[Part] = []
    start = 0
    for piece in pieces(listed):
        columns = columns_of(piece)
        count = len(columns["length"])
        columns["dropped"] = np.flatnonzero(dropped[start : start + count]).astype(np.int32)
        start += count
        parts.append(columns)
    if isinstance(parts[-1], dict):
        parts[-1]["plan"] = np.frombuffer(bytes.fromhex("".join(closed)), np.uint8).reshape(-1, 16)
    return parts


def _fewer(parts: Sequence[Part], inventory: Inventory) -> list[Part]:
    """Small neighbours become one."""
    numbers = {ref.digest: number for number, ref in enumerate(inventory.segments.refs)}

    def columns(part: Part) -> Mapping[str, Array]:
        if isinstance(part, dict):
            return part
        segment = inventory.segments.checked(numbers[part.digest])
        return taken(segment, np.arange(segment.tasks))

    sizes = [len(part["length"]) if isinstance(part, dict) else part.samples for part in parts]
    out = list(parts)
    for run in reversed(to_join(sizes)):
        out[run.start : run.stop] = [joined([columns(parts[number]) for number in run])]
    return out


def _stored(parts: Sequence[Part]) -> tuple[list[SegmentRef], dict[str, bytes]]:
    refs: list[SegmentRef] = []
    files: dict[str, bytes] = {}
    for part in parts:
        if isinstance(part, SegmentRef):
            refs.append(part)
            continue
        columns = finished(part)
        data = to_bytes(columns)
        ref = ref_of(Segment(columns, "a new segment"), digest(data), len(data))
        refs.append(ref)
        files[segment_name(ref.digest)] = data
    return refs, files
