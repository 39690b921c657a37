"""Bring what other stores of the same teacher hold into one. Nothing is computed, nothing is decoded.

The order is that of every writer: data first, durable and checked against the committed hashes, then the
commit records, samples last. So a kill at any moment leaves a store that the same merge completes.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from featurestore.bundle import bundle_name, check_extent
from featurestore.catalogue.pending import Pending
from featurestore.errors import CorruptionError, SpecMismatchError, StoreFormatError
from featurestore.format.directory import (
    SPEC_FILE,
    provenance_names,
    read_provenance,
    read_teacher_listing,
    teacher_listings,
)
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, Stamp
from featurestore.format.states.transform import TRANSFORMED
from featurestore.format.written import piece_names, read_piece
from featurestore.parallel import in_order
from featurestore.storage.files import copy_checked, writing
from featurestore.storage.protocol import Root
from featurestore.storage.root import root_of
from featurestore.store import FeatureStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What one merge did. tasks, records: copied, not those that were there; bytes: of the copied files."""

    sources: int
    tasks: int
    records: int
    bytes: int
    manifest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def merge_stores(path: str | Path, sources: Sequence[str | Path], progress: Progress | None = None) -> Merged:
    """Copy into the store at `path` (made if absent) all that is committed in `sources` and not in it.

    `progress(done, total)` is called with bytes. Raises SpecMismatchError when the stores are not all of one
    teacher and StoreNotFoundError when a source is none, both before anything is written; CorruptionError,
    naming the file, when a source is damaged: nothing of that task is committed then, what came before stays.
    """
    opened = [FeatureStore.open(source) for source in sources]
    if not opened:
        raise StoreFormatError("there is no store to merge from")
    if root_of(path).exists(SPEC_FILE) and not (target := FeatureStore.open(path)).is_empty():
        opened.insert(0, target)
    for other in opened[1:]:
        _check_same_teacher(opened[0], other)
    _check_same_bases(opened)
    store = FeatureStore.create(path, opened[0].identity)
    others = [one for one in opened if one.path != store.path]
    works = _plan(store, others)
    done, total = 0, sum(record.size for work in works for record in work.records)
    known = set(store.known_tasks())
    for source in others:
        tasks = source.known_tasks()
        store.add_plan([task for name, task in tasks.items() if name not in known])
        known.update(tasks)
    for size in in_order(partial(_copy_task, store), works):
        done += size
        if progress is not None:
            progress(done, total)
    for source in others:
        _copy_side_files(store, source)
    return Merged(
        sources=len(others),
        tasks=len({work.task.id for work in works}),
        records=sum(len(work.records) for work in works),
        bytes=total,
        manifest=store.publish_manifest().digest,
    )


def _check_same_teacher(first: FeatureStore, other: FeatureStore) -> None:
    differences = first.identity.differences(other.identity)
    if differences:
        listed = "; ".join(f"{n} is {a!r} in the first, {b!r} in the second" for n, a, b in differences)
        raise SpecMismatchError(
            f"{first.path} and {other.path} are of different teachers or engines: {listed}"
        )


def _check_same_bases(stores: Sequence[FeatureStore]) -> None:
    """A store has one basis of each type: codes in another mean something else."""
    first: dict[str, tuple[FeatureStore, Stamp]] = {}
    for store in stores:
        for part, (name, stamp) in store.sidecar().items():
            if part not in TRANSFORMED:
                continue
            other, there = first.setdefault(part, (store, stamp))
            if there != stamp:
                raise SpecMismatchError(
                    f"{other.path} and {store.path} hold final states as {part} in different bases "
                    f"(teacher/{name}); capture one of them anew, into a copy of the other"
                )


@dataclass(frozen=True)
class _Work:
    """The records of one task that one source adds, samples last."""

    source: FeatureStore
    task: Task
    records: tuple[CommitRecord, ...]


def _plan(store: FeatureStore, sources: Sequence[FeatureStore]) -> list[_Work]:
    """What each source has that neither the store nor an earlier source has."""
    inventory = store.inventory()
    have: set[tuple[str, str]] = set()
    works = []
    for source in sources:
        tasks = source.known_tasks()
        have |= {(group, task) for group, done in inventory.committed(tasks).items() for task in done}
        new: dict[str, list[CommitRecord]] = {}
        # "samples" sorts behind every other group.
        for group, records in sorted(source.commits().items()):
            for task, record in records.items():
                if (group, task) in have:
                    continue
                if task not in tasks:
                    raise CorruptionError(f"{source.path}: no plan file has task {task}, which is committed")
                check_extent(record, tasks[task])
                have.add((group, task))
                new.setdefault(task, []).append(record)
        works += [_Work(source, tasks[task], tuple(records)) for task, records in new.items()]
    return works


def _copy_task(store: FeatureStore, work: _Work) -> int:
    """Copy the bundles of one task, check and settle them, then commit. Nothing is left after an error.

    Returns:
        bytes that were copied.
    """
    source, target = work.source.root, store.root
    names: dict[str, str] = {}
    folders: dict[str, Path] = {}
    with writing(f"task {work.task.id}", store.path):
        try:
            for record in work.records:
                if record.bundle not in names:
                    names[record.bundle], folders[record.bundle] = _begin(target, record.bundle)
                stamps = {f"{bundle_name(record)}/{file}": stamp for file, stamp in record.files.items()}
                source.check(stamps, deep=False)
                for file, stamp in record.files.items():
                    copy = folders[record.bundle] / file
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with source.naming():
                        copy_checked(source.local(f"{bundle_name(record)}/{file}"), copy, stamp)
            for name in names.values():
                target.settle(name)
            records = [replace(record, bundle=names[record.bundle]) for record in work.records]
            for name in names.values():
                groups = tuple(record.group for record in records if record.bundle == name)
                store.announce(Pending(bundle=name, task=work.task, groups=groups))
        except BaseException:
            # Only markers refer to the bundles yet, which promise nothing. Once commits begin, records may.
            for name in names.values():
                target.abandon(name)
            raise
    store.commit(records)
    return sum(record.size for record in records)


def _begin(target: Root, name: str) -> tuple[str, Path]:
    """A new bundle of that name, so that a copy has the manifest of its source; of another one when it is
    taken, as by a merge that was killed.
    """
    with contextlib.suppress(FileExistsError):
        return name, target.begin(name)
    fresh = f"{name.partition('-')[0]}-{secrets.token_hex(6)}"
    return fresh, target.begin(fresh)


def _copy_side_files(store: FeatureStore, source: FeatureStore) -> None:
    """The teacher's files, the records of runs, and written texts: checked, under their own names."""
    for listing in teacher_listings(source.root):
        stamps = read_teacher_listing(source.root, listing)
        source.root.check({f"teacher/{name}": stamp for name, stamp in stamps.items()})
        files = {n: source.root.load(f"teacher/{n}", _bytes, size) for n, (size, _) in stamps.items()}
        store.put_teacher_files(files)
    with writing("provenance", store.path):
        for name in provenance_names(source.root):
            read_provenance(source.root, name)
            store.root.publish(f"provenance/{name}", source.root.load(f"provenance/{name}", _bytes))
    with writing("written texts", store.path):
        for name in piece_names(source.root):
            read_piece(source.root, name)
            store.root.publish(name, source.root.load(name, _bytes))


def _bytes(data: bytes, _where: str) -> bytes:
    return data
