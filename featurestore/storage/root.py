"""Where a store lies: what the rest of the package asks of a place, a local directory, and the choice by URL.

Names are relative to the store, with slashes. Every file is immutable once it appears under its name, so a
root may keep a copy of what it has seen.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from featurestore.errors import StoreFormatError
from featurestore.storage.files import (
    MAX_RECORD_BYTES,
    TEMPORARY,
    check_file,
    ensure_directory,
    names_in,
    publish,
    read_bounded,
    sync,
    sync_tree,
    write_new,
)

T = TypeVar("T")
Parse = Callable[[bytes, str], T]
Stamps = Mapping[str, tuple[int, str]]

PARTS = "parts"
WRITTEN = "written"
SCHEMES = ("s3", "gs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class State:
    """Of a file, or of all files in a folder. modified: newest change in seconds, by the clock of `now`."""

    bytes: int
    modified: float


class Root(Protocol):
    """A place for one store.

    Reading raises CorruptionError, naming the file, for what is missing or damaged, and StoreAccessError when
    the place does not answer. Writing raises OSError.
    """

    keeps_copies: bool
    """Whether what is read comes from copies, which can be damaged while the store is sound."""

    @property
    def location(self) -> str | Path:
        """What opens this store again: a directory, or a URL."""

    def where(self, name: str) -> str:
        """How messages name a file."""

    def local(self, name: str) -> Path:
        """Where a file lies on this machine once `fetch` or `check` has seen it."""

    def naming(self) -> AbstractContextManager[None]:
        """Errors of the body that name a local copy come out naming the file in the store."""

    def probe(self) -> None:
        """Raise StoreAccessError unless the place can be listed."""

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder ("" is the store), without temporary files; empty when there is none."""

    def exists(self, name: str) -> bool:
        """Is there such a file."""

    def size(self, name: str) -> int:
        """Bytes of a file, 0 when there is none."""

    def load(self, name: str, parse: Parse[T], limit: int = MAX_RECORD_BYTES) -> T:
        """`parse(data, where)` of a file of at most `limit` bytes."""

    def fetch(self, limits: Mapping[str, int]) -> None:
        """Have these files at hand, several at once; what is missing or over its limit is left out."""

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        """Have these files at hand; CorruptionError unless size and, if `deep`, hash are as stamped."""

    def make(self) -> None:
        """Make the place itself, durable; OSError when it cannot hold a store."""

    def publish(self, name: str, data: bytes) -> bool:
        """Make `data` appear at once, whole and durable, unless the name is taken; did this call do it."""

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` in the place of a file, at once and durable. Nothing but SPEC.json is ever replaced."""

    def same(self, name: str, data: bytes) -> bool:
        """Does the file have these bytes now, whatever copies say."""

    def begin(self, bundle: str) -> Path:
        """A new private directory for the files of parts/<bundle>."""

    def settle(self, bundle: str) -> Path:
        """Make the bundle's files durable under parts/<bundle>; returns the directory to hash them in."""

    def finish(self, bundle: str) -> None:
        """The bundle is whole and about to be committed."""

    def abandon(self, bundle: str) -> None:
        """Remove a bundle that was not finished, as far as possible."""

    def unfinished(self) -> list[str]:
        """Names of temporary files and folders."""

    def state(self, name: str) -> State | None:
        """Of a file or folder; None when there is none."""

    def now(self) -> float:
        """The time in seconds by the clock of the place."""

    def remove(self, name: str, spare: Callable[[str], bool]) -> None:
        """Remove a file or folder unless `spare(bundle name)`, asked as late as possible."""

    def audit(self) -> AbstractContextManager[Root]:
        """The same store with nothing remembered: what is read through it is what lies there now."""

    def release(self, folder: str) -> None:
        """An audit is done with a folder: its copies may go."""


def is_url(path: str | Path) -> bool:
    """Is this in an object store (or meant to be)."""
    return bool(_URL.match(_spelling(path)))


def root_of(path: str | Path) -> Root:
    """The root at a directory or a URL; StoreFormatError for a URL that we cannot serve."""
    text = _spelling(path)
    scheme = _URL.match(text)
    if scheme is None:
        # A shell leaves the ~ of --out=~/cache alone.
        return LocalRoot(Path(path).expanduser())
    if scheme[1] not in SCHEMES:
        known = " or ".join(f"{name}://bucket/prefix" for name in SCHEMES)
        raise StoreFormatError(f"{text}: unknown kind of URL; give {known}, or a local path")
    from featurestore.storage.remote import RemoteRoot

    return RemoteRoot(text)


def _spelling(path: str | Path) -> str:
    """pathlib turns s3://bucket into s3:/bucket, which would be a local directory."""
    return re.sub(rf"^({'|'.join(SCHEMES)}):/(?=[^/])", r"\1://", str(path))


class LocalRoot:
    """A directory. Files are published with link(2), which never replaces."""

    keeps_copies = False

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def location(self) -> Path:
        return self.path

    def where(self, name: str) -> str:
        return str(self.path / name)

    def local(self, name: str) -> Path:
        return self.path / name

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()

    def probe(self) -> None:
        pass

    def names(self, folder: str) -> list[str]:
        return names_in(self.path / folder)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def load(self, name: str, parse: Parse[T], limit: int = MAX_RECORD_BYTES) -> T:
        path = self.path / name
        return parse(read_bounded(path, limit), str(path))

    def fetch(self, limits: Mapping[str, int]) -> None:
        pass

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        for name, stamp in stamps.items():
            check_file(self.path / name, stamp, deep)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)

    def publish(self, name: str, data: bytes) -> bool:
        path = self.path / name
        ensure_directory(path.parent, self.path)
        return publish(path, data)

    def replace(self, name: str, data: bytes) -> None:
        temporary = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
        write_new(temporary, data)
        temporary.replace(self.path / name)
        sync(self.path)

    def same(self, name: str, data: bytes) -> bool:
        path = self.path / name
        return path.exists() and read_bounded(path) == data

    def begin(self, bundle: str) -> Path:
        ensure_directory(self.path / PARTS, self.path)
        directory = self.path / PARTS / bundle
        directory.mkdir()
        return directory

    def settle(self, bundle: str) -> Path:
        directory = self.path / PARTS / bundle
        sync_tree(directory)
        sync(directory.parent)
        return directory

    def finish(self, bundle: str) -> None:
        # For `gc`, which takes a bundle that nobody has touched for long as garbage.
        os.utime(self.path / PARTS / bundle)

    def abandon(self, bundle: str) -> None:
        directory = self.path / PARTS / bundle
        # After one write has failed, a thread of zarr's may still be at another and make a file anew.
        for _ in range(10):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                return
            time.sleep(0.02)

    def unfinished(self) -> list[str]:
        folders = [self.path / name for name in ("", PARTS, "provenance", "teacher")]
        folders += [*self.path.glob("commit/*"), *self.path.glob(f"{WRITTEN}/*")]
        found = [path for folder in folders for path in sorted(folder.glob(f"{TEMPORARY}*"))]
        return [str(path.relative_to(self.path)) for path in found]

    def state(self, name: str) -> State | None:
        path = self.path / name
        try:
            inside = [Path(folder, file) for folder, _, files in os.walk(path) for file in (".", *files)]
            states = [one.stat() for one in (path, *inside)]
        except FileNotFoundError:
            return None
        size = sum(one.stat().st_size for one in {path, *inside} if one.is_file())
        return State(size, max(state.st_mtime for state in states))

    def now(self) -> float:
        """The file system's time, which on a network is not this machine's."""
        probe = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
        probe.touch(exist_ok=False)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def remove(self, name: str, spare: Callable[[str], bool]) -> None:
        """A bundle goes out of the way first, then away, unless a commit record has come to name it."""
        path = self.path / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        # A collection that was killed here has left the prefix behind.
        bundle = path.with_name(path.name.removeprefix(TEMPORARY))
        aside = path.with_name(f"{TEMPORARY}{bundle.name}")
        path.rename(aside)
        if spare(bundle.name):
            aside.rename(bundle)
            return
        shutil.rmtree(aside)

    def audit(self) -> AbstractContextManager[Root]:
        return nullcontext(self)

    def release(self, folder: str) -> None:
        pass
