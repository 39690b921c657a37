"""A store in a local directory."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from featurestore.storage.files import (
    MAX_RECORD_BYTES,
    TEMPORARY,
    check_file,
    ensure_directory,
    inside,
    names_in,
    publish,
    read_bounded,
    remove_unfinished,
    sync,
    sync_tree,
    write_new,
)
from featurestore.storage.protocol import LISTS, PARTS, WRITTEN, Parse, Root, Stamps, State, T

# Folders to remember: a store may have millions.
_FOLDERS = 4096


class LocalRoot:
    """A directory. Files are published with link(2), which never replaces."""

    keeps_copies = False

    def __init__(self, path: Path) -> None:
        self.path = path
        # Folders that are known to lie inside of the store: a file in one costs one look at itself.
        self._folders: set[Path] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.path,))

    @property
    def location(self) -> Path:
        return self.path

    def where(self, name: str) -> str:
        return str(self.path / name)

    def local(self, name: str) -> Path:
        """The path of a file or folder; CorruptionError where a symbolic link leads out of the store."""
        path = self.path / name
        if path.parent not in self._folders:
            inside(path.parent, self.path)
            if len(self._folders) >= _FOLDERS:
                self._folders.clear()
            self._folders.add(path.parent)
        return inside(path, self.path) if path.is_symlink() else path

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
        path = self.local(name)
        return parse(read_bounded(path, limit), str(path))

    def fetch(self, limits: Mapping[str, int]) -> None:
        pass

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        for name, stamp in stamps.items():
            check_file(self.local(name), stamp, deep)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)

    def publish(self, name: str, data: bytes) -> bool:
        path = self.local(name)
        ensure_directory(path.parent, self.path)
        return publish(path, data)

    def replace(self, name: str, data: bytes) -> None:
        temporary = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
        write_new(temporary, data)
        temporary.replace(self.path / name)
        sync(self.path)

    def same(self, name: str, data: bytes) -> bool:
        path = self.local(name)
        return path.exists() and read_bounded(path) == data

    def begin(self, bundle: str) -> Path:
        directory = self.local(f"{PARTS}/{bundle}")
        ensure_directory(directory.parent, self.path)
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
        remove_unfinished(self.path / PARTS / bundle)

    def unfinished(self) -> list[str]:
        folders = [self.path / name for name in ("", PARTS, *LISTS, "provenance", "teacher")]
        folders += [*self.path.glob("commit/*"), *self.path.glob(f"{WRITTEN}/*")]
        leftovers = [path for folder in folders for path in sorted(folder.glob(f"{TEMPORARY}*"))]
        return [str(path.relative_to(self.path)) for path in leftovers]

    def state(self, name: str) -> State | None:
        path = self.path / name
        try:
            inside = [Path(folder, file) for folder, _, files in os.walk(path) for file in (".", *files)]
            states = [entry.stat() for entry in (path, *inside)]
        except FileNotFoundError:
            return None
        size = sum(entry.stat().st_size for entry in {path, *inside} if entry.is_file())
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
        if path.is_symlink() or not path.is_dir():
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
