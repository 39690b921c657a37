"""What the rest of the package asks of the place where a store lies, whether a directory or a bucket.

Names are relative to the store, with slashes. Every file is immutable once it appears under its name, so a
root may keep a copy of what it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from featurestore.storage.files import MAX_RECORD_BYTES

T = TypeVar("T")
Parse = Callable[[bytes, str], T]
Stamps = Mapping[str, tuple[int, str]]

PARTS = "parts"
WRITTEN = "written"
SEGMENTS = "segments"
HEADS = "heads"
PENDING = "pending"
LISTS = (SEGMENTS, HEADS, PENDING)


@dataclass(frozen=True)
class State:
    """Of a file, or of all files in a folder. modified: newest change in seconds, by the clock of `now`."""

    bytes: int
    modified: float


class Root(Protocol):
    """A place for one store: all that the rest of the package asks of a directory or a bucket.

    An implementation guarantees that

    - `publish` decides between writers that run at the same moment. Of several calls with different bytes one
      returns True, and no reader ever sees a part of a file. To look first and then write is not enough;
    - what `publish`, `replace` and `settle` wrote survives a crash once they have returned;
    - a file never changes once it is there, except SPEC.json.

    Reading raises CorruptionError, naming the file, for what is missing or damaged, and StoreAccessError when
    the place does not answer. Writing raises OSError. Tests of what holds for every place take the fixture
    `place`.
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
