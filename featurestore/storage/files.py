"""Durable files: written whole, synced, published without replacing, and read with a bound."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from featurestore.errors import CorruptionError, StoreWriteError

TEMPORARY = ".tmp-"
MAX_RECORD_BYTES = 256 * 2**20
BLOCK_BYTES = 4 * 2**20
# Looks, 20 ms apart, at whether a folder is gone: in all, and in a row that find nothing.
_LOOKS, _ABSENT = 50, 10


@contextmanager
def writing(what: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError of the body into a StoreWriteError that says what could not be written, and why."""
    try:
        yield
    except (StoreWriteError, CorruptionError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        failure = StoreWriteError(
            f"cannot write {what} under {path}: {reason}. Nothing committed is lost; "
            "fix this and run the same command again"
        )
        failure.errno = error.errno
        raise failure from error


def ensure_directory(path: Path, root: Path) -> None:
    """Make `path` and its parents below `root`, each entry durable."""
    if path == root or path.is_dir():
        return
    ensure_directory(path.parent, root)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """fsync every file and directory below `directory`, and itself, leaves first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def write_new(path: Path, data: bytes) -> None:
    """Create `path` with `data` and fsync it; FileExistsError when it is there already."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path, data: bytes) -> bool:
    """Make `data` appear at `path` at once, whole and durable, unless the name is taken.

    Returns whether this call published it. link(2) never replaces, so of two racing writers one wins.
    """
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        write_new(temporary, data)
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            won = False
    finally:
        temporary.unlink(missing_ok=True)
    # The loser syncs too: it goes on as if the record were durable, so it has to be.
    sync(path.parent)
    return won


def remove_unfinished(directory: Path) -> None:
    """Delete a folder that arrays were being written to when something failed.

    After one write has failed, threads of zarr's may still be at others and make the folder anew, late on a
    busy machine: it has to stay away for a while.
    """
    absent = 0
    for _ in range(_LOOKS):
        shutil.rmtree(directory, ignore_errors=True)
        absent = 0 if directory.exists() else absent + 1
        if absent == _ABSENT:
            return
        time.sleep(0.02)


def read_bounded(path: Path, limit: int = MAX_RECORD_BYTES) -> bytes:
    """The bytes of a file; CorruptionError when it is missing, unreadable or larger than `limit`."""
    try:
        size = regular_size(path)
        if size > limit:
            raise CorruptionError(f"{path}: larger than {limit} bytes")
        with path.open("rb") as file:
            # A bounded read allocates its bound at once, so the bound is the size that the file has.
            return file.read(size)
    except CorruptionError:
        raise
    except OSError as error:
        raise CorruptionError(f"{path}: {_reason(error)}") from None


def regular_size(path: Path) -> int:
    """Bytes of a file, by which a reader may allocate; OSError when it is missing.

    CorruptionError for anything that is no regular file: to open a pipe or a device may wait for ever.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CorruptionError(f"{path}: not a regular file")
    return status.st_size


def inside(path: Path, root: Path) -> Path:
    """`path`, which lies below `root` by its name; CorruptionError where a symbolic link leads out of there.

    Links inside a store are followed, and a store may lie behind one. One that was made by somebody else
    could otherwise have a reader read, copy or upload any file of this machine, or a writer write there.
    """
    try:
        real, home = path.resolve(strict=False), root.resolve(strict=False)
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CorruptionError(f"{path}: a symbolic link that leads nowhere ({error})") from None
    if real != home and home not in real.parents:
        raise CorruptionError(f"{path}: a symbolic link leads out of the store; it is not followed")
    return path


def hash_file(path: Path) -> tuple[int, str]:
    """(size in bytes, XXH3-64 as 16 hex digits); CorruptionError when the file cannot be read."""
    hasher, size = xxhash.xxh3_64(), 0
    for block in _blocks(path):
        hasher.update(block)
        size += len(block)
    return size, hasher.hexdigest()


def copy_checked(source: Path, target: Path, stamp: tuple[int, str]) -> None:
    """Copy a file to the new name `target`; CorruptionError unless its bytes are the committed ones."""
    hasher, size = xxhash.xxh3_64(), 0
    with target.open("xb") as out:
        for block in _blocks(source):
            hasher.update(block)
            size += len(block)
            out.write(block)
    if (size, hasher.hexdigest()) != stamp:
        raise CorruptionError(f"{source}: not the bytes that were committed; the file is damaged")


def check_file(path: Path, stamp: tuple[int, str], deep: bool = True) -> None:
    """CorruptionError unless the file has the size, and if `deep` the hash, that were committed."""
    try:
        size = regular_size(path)
    except CorruptionError:
        raise
    except OSError as error:
        raise CorruptionError(f"{path}: {_reason(error)}") from None
    if size != stamp[0]:
        raise CorruptionError(f"{path}: {size} bytes, but {stamp[0]} were committed")
    if deep and hash_file(path) != stamp:
        raise CorruptionError(f"{path}: its hash is not the committed one; the file is damaged")


def names_in(directory: Path) -> list[str]:
    """Sorted names in a directory, without temporary files; empty when there is no such directory."""
    try:
        names = os.listdir(directory)  # noqa: PTH208  (names only; a Path each is slow for 100k records)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if not directory.exists():  # below a file
            raise
        raise CorruptionError(f"{directory}: not a directory") from None
    return sorted(name for name in names if not name.startswith(TEMPORARY))


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, block by block; CorruptionError when it cannot be read."""
    try:
        regular_size(path)
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except CorruptionError:
        raise
    except OSError as error:
        raise CorruptionError(f"{path}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return "the file is missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
