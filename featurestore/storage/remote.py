"""A store in object storage (S3 and what speaks its protocol, Google Cloud Storage), read through a mirror.

The mirror is a local directory of copies. Files of a store never change, so a copy is never stale; one that
does not pass its check is thrown away and downloaded again before the store itself is called damaged.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from distily.system.machine import CACHE_VARIABLE, cache_directory
from distily.text import one_line
from featurestore.errors import CorruptionError, FeatureStoreError, StoreAccessError
from featurestore.identity import canonical_json, digest
from featurestore.storage.files import (
    MAX_RECORD_BYTES,
    TEMPORARY,
    check_file,
    read_bounded,
    remove_unfinished,
)
from featurestore.storage.objects import Objects, forked
from featurestore.storage.protocol import PARTS, Parse, Root, Stamps, State, T

SPEC_FILE = "SPEC.json"
TRANSFERS = 8


class RemoteRoot:
    """A store at a URL. Safe to use from several threads, and for reading after a fork."""

    keeps_copies = True

    def __init__(self, url: str, mirror: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self._objects = Objects(self.url)
        self._mirror = mirror
        # Name -> the download of it that a thread is at.
        self._under_way: dict[str, threading.Event] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.url, self.mirror))

    @property
    def location(self) -> str:
        return self.url

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def local(self, name: str) -> Path:
        return self.mirror / name

    @property
    def mirror(self) -> Path:
        """The directory of copies.

        Its name is a digest of the URL and of when SPEC.json was written there: another store that is made at
        the same URL later has another mirror.
        """
        if self._mirror is None:
            spec = self._objects.head(SPEC_FILE)
            if spec is None:
                raise CorruptionError(f"{self.where(SPEC_FILE)}: the file is missing")
            written = [self.url, str(spec["e_tag"]), spec["last_modified"].isoformat()]
            self._mirror = cache_directory() / digest(canonical_json(written))
        return self._mirror

    @contextmanager
    def naming(self) -> Iterator[None]:
        try:
            yield
        except FeatureStoreError as error:
            raise type(error)(str(error).replace(str(self.mirror), self.url)) from None

    def probe(self) -> None:
        self._objects.within("")

    def names(self, folder: str) -> list[str]:
        return [name for name in self._objects.within(folder) if not name.startswith(TEMPORARY)]

    def exists(self, name: str) -> bool:
        return self._objects.head(name) is not None

    def size(self, name: str) -> int:
        meta = self._objects.head(name)
        return 0 if meta is None else int(meta["size"])

    def load(self, name: str, parse: Parse[T], limit: int = MAX_RECORD_BYTES) -> T:
        while True:
            downloaded = self._download(name, limit)
            path = self.local(name)
            try:
                with self.naming():
                    return parse(read_bounded(path, limit), self.where(name))
            except FeatureStoreError:
                path.unlink(missing_ok=True)
                if downloaded:
                    raise

    def fetch(self, limits: Mapping[str, int]) -> None:
        missing = {name: limit for name, limit in limits.items() if not self.local(name).exists()}
        if missing and forked():
            self._download_elsewhere(missing)
        elif missing:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(self._download_if_sound, missing, missing.values()))

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        new = {name: stamp[0] for name, stamp in stamps.items() if not self.local(name).exists()}
        self.fetch(new)
        for name, stamp in stamps.items():
            try:
                self._check(name, stamp, deep or name in new)
            except CorruptionError:
                # A broken mirror is not a broken store.
                self.local(name).unlink(missing_ok=True)
                self._check(name, stamp, deep=True)

    def make(self) -> None:
        """There is nothing to make. Find out whether the service replaces what it was told not to."""
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            if self.publish(name, b"first") and self.publish(name, b"second"):
                raise StoreAccessError(
                    f"{self.url}: this service ignores `If-None-Match: *`, so two writers would overwrite "
                    "each other; use one that honours it, or a local directory"
                )
        finally:
            self._objects.delete([name])

    def publish(self, name: str, data: bytes) -> bool:
        return self._objects.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        self._objects.put(name, data)

    def same(self, name: str, data: bytes) -> bool:
        return self._objects.equals(name, data) is True

    def begin(self, bundle: str) -> Path:
        directory = self._private(bundle)
        directory.mkdir(parents=True)
        return directory

    def settle(self, bundle: str) -> Path:
        directory = self._private(bundle)
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        names = [f"{PARTS}/{bundle}/{path.relative_to(directory)}" for path in paths]
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(self._objects.put, names, paths))
        arrived = {meta["path"]: meta["size"] for meta in self._objects.below(f"{PARTS}/{bundle}")}
        for name, path in zip(names, paths, strict=True):
            sent = path.stat().st_size
            if arrived.get(name) != sent:
                raise StoreAccessError(
                    f"{self.where(name)}: {sent} bytes sent, {arrived.get(name, 0)} arrived"
                )
        return directory

    def finish(self, bundle: str) -> None:
        shutil.rmtree(self._private(bundle), ignore_errors=True)

    def abandon(self, bundle: str) -> None:
        remove_unfinished(self._private(bundle))
        with suppress(FeatureStoreError):
            self._objects.delete([meta["path"] for meta in self._objects.below(f"{PARTS}/{bundle}")])

    def unfinished(self) -> list[str]:
        return [name for name in self._objects.within("") if name.startswith(TEMPORARY)]

    def state(self, name: str) -> State | None:
        metas = self._objects.below(name) or [meta for meta in [self._objects.head(name)] if meta]
        if not metas:
            return None
        newest = max(meta["last_modified"].timestamp() for meta in metas)
        return State(sum(meta["size"] for meta in metas), newest)

    def now(self) -> float:
        """The service's time: what it says of an object that was made just now."""
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        self._objects.create(name, b"")
        try:
            state = self.state(name)
        finally:
            self._objects.delete([name])
        if state is None:
            raise StoreAccessError(f"{self.where(name)}: vanished as soon as it was made")
        return state.modified

    def remove(self, name: str, spare: Callable[[str], bool]) -> None:
        if not spare(name.rsplit("/", 1)[-1]):
            self._objects.delete([meta["path"] for meta in self._objects.below(name)] or [name])

    def audit(self) -> AbstractContextManager[Root]:
        return _audited(self.url)

    def release(self, folder: str) -> None:
        pass

    def _private(self, bundle: str) -> Path:
        return self.mirror / f"{TEMPORARY}{bundle}"

    def _check(self, name: str, stamp: tuple[int, str], deep: bool) -> None:
        self._download(name, stamp[0])
        with self.naming():
            check_file(self.local(name), stamp, deep)

    def _download_if_sound(self, name: str, limit: int) -> None:
        # `load` and `check` come to the same file and say what is wrong with it.
        with suppress(CorruptionError):
            self._download(name, limit)

    def _download(self, name: str, limit: int) -> bool:
        """Have a copy in the mirror; was it made just now. The rename lets other processes share it."""
        path = self.local(name)
        if path.exists():
            return False
        if forked():
            self._download_elsewhere({name: limit})
            if not path.exists():
                raise CorruptionError(f"{self.where(name)}: the file is missing, or more than {limit} bytes")
            return True
        done = threading.Event()
        if (other := self._under_way.setdefault(name, done)) is not done:
            other.wait()
            return self._download(name, limit)
        try:
            if path.exists():
                return False
            self._download_here(name, path, limit)
        finally:
            del self._under_way[name]
            done.set()
        return True

    def _download_here(self, name: str, path: Path, limit: int) -> None:
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.writelines(self._objects.blocks(name, limit))
            temporary.replace(path)
        except FeatureStoreError:
            raise
        except OSError as error:
            raise StoreAccessError(
                f"cannot keep a copy of {self.url} in {self.mirror}: {error.strerror or error}; "
                f"free space there or set {CACHE_VARIABLE} to another directory"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _download_elsewhere(self, limits: Mapping[str, int]) -> None:
        """In a new process, because this one was forked from one that had used obstore."""
        done = subprocess.run(
            [sys.executable, "-m", "featurestore.storage.remote", self.url, str(self.mirror)],
            input="".join(f"{limit} {name}\n" for name, limit in limits.items()),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise StoreAccessError((done.stderr.strip().splitlines() or ["no reason given"])[-1])


@contextmanager
def _audited(url: str) -> Iterator[Root]:
    with tempfile.TemporaryDirectory(prefix="distily-cache-audit-") as mirror:
        yield _AuditedRoot(url, Path(mirror))


class _AuditedRoot(RemoteRoot):
    """Sizes come from one listing of the whole store, bytes from copies that live as long as the audit."""

    def __init__(self, url: str, mirror: Path) -> None:
        super().__init__(url, mirror)
        self._sizes = {meta["path"]: int(meta["size"]) for meta in self._objects.below("")}

    def size(self, name: str) -> int:
        return self._sizes.get(name, 0)

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        for name, (size, _) in stamps.items():
            if name not in self._sizes:
                raise CorruptionError(f"{self.where(name)}: the file is missing")
            if self._sizes[name] != size:
                raise CorruptionError(
                    f"{self.where(name)}: {self._sizes[name]} bytes, but {size} were committed"
                )
        if deep:
            super().check(stamps, deep)

    def release(self, folder: str) -> None:
        shutil.rmtree(self.local(folder), ignore_errors=True)


def _main(url: str, mirror: str, lines: Iterable[str]) -> None:
    """Download what `lines` name ("limit name") into a mirror; see `_download_elsewhere`."""
    pairs = (line.split(maxsplit=1) for line in lines)
    try:
        RemoteRoot(url, Path(mirror)).fetch({name.strip(): int(limit) for limit, name in pairs})
    except FeatureStoreError as error:
        sys.exit(one_line(error, None))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.stdin)
