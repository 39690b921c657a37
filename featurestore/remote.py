"""A store in object storage (S3 and what speaks its protocol, Google Cloud Storage), read through a mirror.

The mirror is a local directory of copies. Files of a store never change, so a copy is never stale; one that
does not pass its check is thrown away and downloaded again before the store itself is called damaged.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from featurestore.errors import CorruptionError, FeatureStoreError, StoreAccessError, StoreFormatError
from featurestore.files import MAX_RECORD_BYTES, TEMPORARY, check_file, read_bounded
from featurestore.identity import canonical_json, digest
from featurestore.root import PARTS, Parse, Root, Stamps, State, T

MIRROR_VARIABLE = "DISTILY_CACHE_DIR"
SPEC_FILE = "SPEC.json"
TRANSFERS = 8
CREATE_ATTEMPTS = 3
TRUE = ("1", "true", "yes", "on")
RETRIES: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}

# The process whose obstore runs its threads. They do not survive a fork, and a call in the child would hang.
_runtime_owner: int | None = None


class RemoteRoot:
    """A store at a URL. Safe to use from several threads, and for reading after a fork."""

    def __init__(self, url: str, mirror: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self._mirror = mirror
        self._client: Any = None
        # Fails here, before any work, when the package is missing or the URL cannot be one.
        obstore = _obstore(self.url)
        if not _forked():
            with self._errors():
                self._client = obstore.store.from_url(
                    self.url, retry_config=RETRIES, client_options=_client_options()
                )

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
            spec = self._head(SPEC_FILE)
            if spec is None:
                raise CorruptionError(f"{self.where(SPEC_FILE)}: the file is missing")
            written = [self.url, str(spec["e_tag"]), spec["last_modified"].isoformat()]
            base = os.environ.get(MIRROR_VARIABLE) or Path.home() / ".cache" / "distily-cache"
            self._mirror = Path(base) / digest(canonical_json(written))
        return self._mirror

    @contextmanager
    def naming(self) -> Iterator[None]:
        try:
            yield
        except FeatureStoreError as error:
            raise self._named(error) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.url, self.mirror))

    def probe(self) -> None:
        self._listing("")

    def names(self, folder: str) -> list[str]:
        names = (name.rsplit("/", 1)[-1] for name in self._listing(folder))
        return sorted(name for name in names if name and not name.startswith(TEMPORARY))

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def size(self, name: str) -> int:
        meta = self._head(name)
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
        missing = [name for name in limits if not self.local(name).exists()]
        if missing and _forked():
            self._download_elsewhere({name: limits[name] for name in missing})
            return

        def quietly(name: str) -> None:
            # `load` and `check` come to the same file and say what is wrong with it.
            with suppress(CorruptionError):
                self._download(name, limits[name])

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(quietly, missing))

    def check(self, stamps: Stamps, deep: bool = True) -> None:
        new = {name for name in stamps if not self.local(name).exists()}
        self.fetch({name: stamps[name][0] for name in new})
        for name, stamp in stamps.items():
            try:
                self._check(name, stamp, deep or name in new)
            except CorruptionError:
                # A broken mirror is not a broken store.
                self.local(name).unlink(missing_ok=True)
                self._check(name, stamp, deep=True)

    def make(self) -> None:
        self.probe()

    def publish(self, name: str, data: bytes) -> bool:
        """A put that creates only. Records hold random names or their own digest, so equal bytes are ours."""
        obstore = _obstore(self.url)
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                with self._errors():
                    obstore.put(self._here(), name, data, mode="create")
                return True
            except (FileExistsError, StoreAccessError):
                # The name is taken: by another writer, or by us in a request whose reply was lost.
                there = self._read(name)
                if there is not None:
                    return there == data
                if attempt == CREATE_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def begin(self, bundle: str) -> Path:
        directory = self._private(bundle)
        directory.mkdir(parents=True)
        return directory

    def settle(self, bundle: str) -> Path:
        obstore, directory = _obstore(self.url), self._private(bundle)
        files = {
            f"{PARTS}/{bundle}/{path.relative_to(directory)}": path
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

        def upload(name: str) -> None:
            with self._errors():
                obstore.put(self._here(), name, files[name])

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(upload, files))
        there = {meta["path"]: meta["size"] for meta in self._list(f"{PARTS}/{bundle}")}
        for name, path in files.items():
            if there.get(name) != path.stat().st_size:
                raise StoreAccessError(
                    f"{self.where(name)}: {path.stat().st_size} bytes were sent, and {there.get(name, 0)} arrived"
                )
        return directory

    def finish(self, bundle: str) -> None:
        shutil.rmtree(self._private(bundle), ignore_errors=True)

    def abandon(self, bundle: str) -> None:
        self.finish(bundle)
        with suppress(FeatureStoreError):
            self._delete([meta["path"] for meta in self._list(f"{PARTS}/{bundle}")])

    def unfinished(self) -> list[str]:
        return sorted(name for name in self._listing("") if name.startswith(TEMPORARY))

    def state(self, name: str) -> State | None:
        found = self._list(name) or [meta for meta in [self._head(name)] if meta is not None]
        if not found:
            return None
        newest = max(meta["last_modified"].timestamp() for meta in found)
        return State(sum(meta["size"] for meta in found), newest)

    def now(self) -> float:
        """The service's time: what it says of an object that was made just now."""
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        self.publish(name, b"")
        try:
            state = self.state(name)
        finally:
            self._delete([name])
        if state is None:
            raise StoreAccessError(f"{self.where(name)}: vanished as soon as it was made")
        return state.modified

    def remove(self, name: str, spare: Callable[[str], bool]) -> None:
        if not spare(name.rsplit("/", 1)[-1]):
            self._delete([meta["path"] for meta in self._list(name)] or [name])

    @contextmanager
    def audit(self) -> Iterator[Root]:
        with tempfile.TemporaryDirectory(prefix="distily-cache-audit-") as mirror:
            yield _AuditedRoot(self.url, Path(mirror))

    def release(self, folder: str) -> None:
        pass

    def _private(self, bundle: str) -> Path:
        return self.mirror / f"{TEMPORARY}{bundle}"

    def _check(self, name: str, stamp: tuple[int, str], deep: bool) -> None:
        self._download(name, stamp[0])
        with self.naming():
            check_file(self.local(name), stamp, deep)

    def _download(self, name: str, limit: int) -> bool:
        """Have a copy in the mirror; was it made just now. The rename lets other processes share it."""
        path = self.local(name)
        if path.exists():
            return False
        if _forked():
            self._download_elsewhere({name: limit})
            if not path.exists():
                raise CorruptionError(f"{self.where(name)}: the file is missing or too large")
            return True
        with self._errors():
            found = _obstore(self.url).get(self._here(), name)
        if found.meta["size"] > limit:
            raise CorruptionError(f"{self.where(name)}: {found.meta['size']} bytes, more than {limit}")
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file, self._errors():
                for block in found.stream():
                    file.write(block)
            temporary.replace(path)
        except OSError as error:
            if isinstance(error, FeatureStoreError):
                raise
            raise StoreAccessError(
                f"cannot keep a copy of {self.url} in {self.mirror}: {error.strerror or error}; "
                f"free space there or set {MIRROR_VARIABLE} to another directory"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _download_elsewhere(self, limits: Mapping[str, int]) -> None:
        """In a new process, because this one was forked from one that had used obstore."""
        wanted = "".join(f"{limit} {name}\n" for name, limit in limits.items())
        done = subprocess.run(
            [sys.executable, "-m", "featurestore.remote", self.url, str(self.mirror)],
            input=wanted,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise StoreAccessError(lines[-1])

    def _read(self, name: str) -> bytes | None:
        """The object's bytes as they are there now, None when it is missing."""
        try:
            with self._errors():
                return bytes(_obstore(self.url).get(self._here(), name).bytes())
        except CorruptionError:
            return None

    def _head(self, name: str) -> Any | None:
        try:
            with self._errors():
                return _obstore(self.url).head(self._here(), name)
        except CorruptionError:
            return None

    def _list(self, folder: str) -> list[Any]:
        """Every object below a folder."""
        with self._errors():
            return list(_obstore(self.url).list(self._here(), folder or None).collect())

    def _listing(self, folder: str) -> list[str]:
        """Paths of the objects and folders right in a folder."""
        with self._errors():
            found = _obstore(self.url).list_with_delimiter(self._here(), folder or None)
        return [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]

    def _delete(self, names: list[str]) -> None:
        with self._errors():
            _obstore(self.url).delete(self._here(), names)

    def _here(self) -> Any:
        """The client, in the process that may use it."""
        global _runtime_owner  # noqa: PLW0603  (obstore has one runtime per process, so this is one per process)
        if self._client is None or _forked():
            raise StoreAccessError(
                f"{self.url}: a process that was forked after the object store was used can only read what "
                "an open reader asks for; open and write stores in the parent, or start processes with spawn"
            )
        _runtime_owner = os.getpid()
        return self._client

    def _named(self, error: FeatureStoreError) -> FeatureStoreError:
        return type(error)(str(error).replace(str(self.mirror), self.url))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """obstore's exceptions as ours, in one line each."""
        base = _obstore(self.url).exceptions
        try:
            yield
        except base.AlreadyExistsError as error:
            raise FileExistsError(self.url) from error
        except (base.BaseError, FileNotFoundError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
                name = re.search(r"location (\S+) not found", text)
                raise CorruptionError(f"{self._spell(name)}: the file is missing") from None
            raise StoreAccessError(f"{self.url}: {_reason(text)}") from None

    def _spell(self, found: re.Match[str] | None) -> str:
        """obstore says where in the bucket; messages say where in the store."""
        bucket = "/".join(self.url.split("/")[:3])
        return f"{bucket}/{found[1]}" if found else self.url


class _AuditedRoot(RemoteRoot):
    """Sizes come from one listing of the whole store, bytes from copies that live as long as the audit."""

    def __init__(self, url: str, mirror: Path) -> None:
        super().__init__(url, mirror)
        self._sizes = {meta["path"]: int(meta["size"]) for meta in self._list("")}

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

    def audit(self) -> AbstractContextManager[Root]:
        raise NotImplementedError("this is an audit")

    def release(self, folder: str) -> None:
        shutil.rmtree(self.local(folder), ignore_errors=True)


def _obstore(url: str) -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StoreFormatError(
            f"{url}: object stores need the package obstore; install the extra [s3]"
        ) from None
    return obstore


def _forked() -> bool:
    return _runtime_owner not in (None, os.getpid())


def _client_options() -> Any:
    # Given options replace those that obstore takes from the environment, so this one is passed on.
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in TRUE
    # The default limit of 30 s is for a whole request, too short for a large object on a slow line.
    return {"allow_http": allow_http, "connect_timeout": "5s", "read_timeout": "60s", "timeout": "1h"}


def _reason(text: str) -> str:
    """What the user has to know of obstore's account of a failed request."""
    hints = {
        "NoSuchBucket": "there is no such bucket",
        "169.254.169.254": "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, "
        "or GOOGLE_APPLICATION_CREDENTIALS for gs://",
        "403 Forbidden": "access denied; check the credentials and what they allow",
        "401 Unauthorized": "access denied; check the credentials",
        "builder error": "the endpoint is plain http; set AWS_ALLOW_HTTP=true if that is meant",
        "error sending request": "no answer from the object store; check the network and AWS_ENDPOINT_URL",
        "Unable to recognise URL": "not a URL of a bucket; give s3://bucket/prefix or gs://bucket/prefix",
    }
    for sign, hint in hints.items():
        if sign in text:
            return hint
    said = re.search(r"<Message>(.*?)</Message>", text, flags=re.S)
    return " ".join((said[1] if said else text.split("\n\nDebug source")[0]).split())


def _main(url: str, mirror: str, lines: Iterable[str]) -> None:
    """Download what `lines` name ("limit name") into a mirror; see `_download_elsewhere`."""
    pairs = (line.split(maxsplit=1) for line in lines)
    limits = {name.strip(): int(limit) for limit, name in pairs}
    try:
        RemoteRoot(url, Path(mirror)).fetch(limits)
    except FeatureStoreError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.stdin)
