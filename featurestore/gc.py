"""What of a store is garbage: bundles that no commit record names, and files that were never finished.

A bundle is private until it is committed, so an unnamed one is either garbage (its writer was killed, or lost
the race for the task) or about to be committed. Nothing tells them apart but time: writers write to a bundle
continually and touch it right before they commit, so one that nobody has touched for an hour has no writer.
The age is taken by the file system's own clock. Committed files, plans and manifests are never garbage.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.directory import SPEC_FILE, committed_groups, committed_tasks
from featurestore.errors import StoreNotFoundError
from featurestore.files import TEMPORARY, names_in, writing
from featurestore.identity import BUNDLE_ID
from featurestore.records import read_commit

MIN_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Orphan:
    """A bundle or an unfinished file. path: relative to the store. age: seconds since its last change.

    removable: it is old enough that no writer can be at work on it.
    """

    path: str
    bytes: int
    age: float
    removable: bool


@dataclass(frozen=True)
class Collection:
    """What `collect` found. deleted: whether the removable ones are gone."""

    orphans: list[Orphan]
    deleted: bool

    @property
    def reclaimed(self) -> int:
        """Bytes of the removable orphans."""
        return sum(orphan.bytes for orphan in self.orphans if orphan.removable)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "reclaimed": self.reclaimed}


def collect(path: str | Path, delete: bool = False, min_age: float = MIN_AGE_SECONDS) -> Collection:
    """Find the garbage of a store, and with `delete` remove what nobody has touched for `min_age` seconds.

    Raises StoreNotFoundError when there is no store, CorruptionError when a commit record cannot be read (it
    might name a bundle that looks like an orphan), StoreWriteError when something cannot be removed.
    """
    root = Path(path)
    if not (root / SPEC_FILE).exists():
        raise StoreNotFoundError(f"no store at {root}: it has no {SPEC_FILE}")
    # Bundles before records: one that is committed in between is found in the records.
    candidates = [root / "parts" / name for name in names_in(root / "parts") if BUNDLE_ID.fullmatch(name)]
    named = _named(root)
    candidates = [bundle for bundle in candidates if bundle.name not in named]
    for folder in (root, root / "parts", root / "provenance", root / "teacher", *root.glob("commit/*")):
        candidates += sorted(folder.glob(f"{TEMPORARY}*"))
    with writing("the garbage collection", root):
        now = _now(root)
        found = [orphan for one in candidates if (orphan := _orphan(root, one, now, min_age)) is not None]
        if delete:
            for orphan in found:
                if orphan.removable:
                    _remove(root, root / orphan.path)
    return Collection(found, delete)


def _named(root: Path) -> set[str]:
    """The bundles that commit records name."""
    return {
        read_commit(root, group, task).bundle
        for group in committed_groups(root)
        for task in committed_tasks(root, group)
    }


def _now(root: Path) -> float:
    """The file system's time, which on a network is not this machine's."""
    probe = root / f"{TEMPORARY}{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _orphan(root: Path, path: Path, now: float, min_age: float) -> Orphan | None:
    """None when it has vanished: its writer has finished, or another collection was quicker."""
    try:
        inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in (".", *names)]
        states = [one.stat() for one in (path, *inside)]
    except FileNotFoundError:
        return None
    age = now - max(state.st_mtime for state in states)
    size = sum(one.stat().st_size for one in {path, *inside} if one.is_file())
    return Orphan(str(path.relative_to(root)), size, round(age, 3), age >= min_age)


def _remove(root: Path, path: Path) -> None:
    """Out of the way first, then away, unless a commit record has come to name it."""
    if path.is_dir():
        # A collection that was killed here has left the prefix behind.
        bundle = path.with_name(path.name.removeprefix(TEMPORARY))
        aside = path.with_name(f"{TEMPORARY}{bundle.name}")
        path.rename(aside)
        if bundle.name in _named(root):
            aside.rename(bundle)
            return
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)
