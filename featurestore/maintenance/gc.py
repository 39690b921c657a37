"""What of a store is garbage: bundles that no commit record names, and files that were never finished.

A bundle is private until it is committed, so an unnamed one is either garbage (its writer was killed, or lost
the race for the task) or about to be committed. Nothing tells them apart but time: writers write to a bundle
continually and touch it right before they commit, so one that nobody has touched for an hour has no writer.
The age is taken by the clock of the file system, or of the object store. The marker of such a bundle is
garbage, too. Committed files, plans, segments and manifests are never garbage.

A collection also sees records that neither a manifest nor a marker names, which none of our writers leaves;
deleting makes a manifest that lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.catalogue.inventory import Inventory, take_stock
from featurestore.catalogue.pending import pending_bundles
from featurestore.catalogue.publishing import publish_newest
from featurestore.errors import StoreNotFoundError
from featurestore.format.directory import SPEC_FILE, committed_groups, committed_tasks
from featurestore.format.records import commit_name, read_commit
from featurestore.identity import BUNDLE_ID
from featurestore.storage.files import MAX_RECORD_BYTES, writing
from featurestore.storage.protocol import PARTS, PENDING, Root
from featurestore.storage.root import root_of

MIN_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Orphan:
    """A bundle, a marker or an unfinished file. path: relative to the store. age: seconds since its last
    change.

    removable: it is old enough that no writer can be at work on it.
    """

    path: str
    bytes: int
    age: float
    removable: bool


@dataclass(frozen=True)
class Collection:
    """What `collect` found. deleted: whether the removable ones are gone. unlisted: commit records that
    neither a manifest nor a marker named; with `deleted` the newest manifest lists them now.
    """

    orphans: list[Orphan]
    deleted: bool
    unlisted: int = 0

    @property
    def reclaimed(self) -> int:
        """Bytes of the removable orphans."""
        return sum(orphan.bytes for orphan in self.orphans if orphan.removable)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "reclaimed": self.reclaimed}


def collect(path: str | Path, delete: bool = False, min_age: float = MIN_AGE_SECONDS) -> Collection:
    """Find the garbage of a store, and with `delete` remove what nobody has touched for `min_age` seconds.

    Raises StoreNotFoundError when there is no store, CorruptionError when a record, marker or segment cannot
    be read (it might name a bundle that looks like an orphan), StoreWriteError when something cannot be
    removed.
    """
    root = root_of(path)
    if not root.exists(SPEC_FILE):
        root.probe()
        raise StoreNotFoundError(f"no store at {root.location}: it has no {SPEC_FILE}")
    # Bundles before records: one that is committed in between is found in the records.
    bundles = [name for name in root.names(PARTS) if BUNDLE_ID.fullmatch(name)]
    markers = pending_bundles(root)
    inventory = take_stock(root, {})
    unlisted = _unlisted(root, inventory)
    named = _listed_bundles(inventory) | {record.bundle for record in inventory.loose_records()}
    named |= {read_commit(root, *key).bundle for key in unlisted}
    candidates = [f"{PARTS}/{bundle}" for bundle in bundles if bundle not in named]
    candidates += [f"{PENDING}/{bundle}.json" for bundle in markers if bundle not in named]
    # Promises of commands that were killed; those at work remove their own.
    candidates += [f"claims/{name}" for name in root.names("claims")]
    with writing("the garbage collection", root.location):
        candidates += root.unfinished()
        now = root.now()
        found = [orphan for name in candidates if (orphan := _orphan(root, name, now, min_age)) is not None]
        if delete:
            for orphan in found:
                if orphan.removable:
                    root.remove(orphan.path, lambda bundle: _is_named(root, bundle.removesuffix(".json")))
            if unlisted:
                publish_newest(root, {}, everything=True)
    return Collection(found, delete, len(unlisted))


def _listed_bundles(inventory: Inventory) -> set[str]:
    """The bundles that the records of the newest manifest name."""
    return {
        bundle
        for number in range(len(inventory.segments))
        for bundle in inventory.segments.checked(number).bundles()
    }


def _unlisted(root: Root, inventory: Inventory) -> list[tuple[str, str]]:
    """(group, task) of the commit records that are neither in a manifest nor found by a marker."""
    if inventory.base is None:
        return []
    keys = list(_unlisted_keys(root, inventory))
    root.fetch({commit_name(*key): MAX_RECORD_BYTES for key in keys})
    return keys


def _unlisted_keys(root: Root, inventory: Inventory) -> Iterator[tuple[str, str]]:
    for group in committed_groups(root):
        tasks = committed_tasks(root, group)
        known = inventory.committed(tasks).get(group, set())
        yield from ((group, task) for task in tasks if task not in known)


def _is_named(root: Root, bundle: str) -> bool:
    """Whether a commit record names a bundle now."""
    task = bundle.partition("-")[0]
    names = ((group, commit_name(group, task)) for group in committed_groups(root))
    return any(root.exists(name) and read_commit(root, group, task).bundle == bundle for group, name in names)


def _orphan(root: Root, name: str, now: float, min_age: float) -> Orphan | None:
    """None when it has vanished: its writer has finished, or another collection was quicker."""
    state = root.state(name)
    if state is None:
        return None
    age = now - state.modified
    return Orphan(name, state.bytes, round(age, 3), age >= min_age)
