"""The segments of a manifest, mapped when they are first touched."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from blake3 import blake3

from featurestore.catalogue.columns import from_buffer
from featurestore.catalogue.manifest import SegmentRef
from featurestore.catalogue.segment import Segment, check
from featurestore.errors import CorruptionError
from featurestore.format.schema import GroupSpec
from featurestore.storage.protocol import Root

# Maps that are held at a time; each takes a file descriptor, of which a process has 1,024 or more.
OPEN_SEGMENTS = 256


class SegmentFiles:
    """The segments of one manifest by number. Processes that map the same file share its memory.

    groups: of the manifest, by id.
    """

    def __init__(self, root: Root, refs: Sequence[SegmentRef], groups: Mapping[str, GroupSpec]) -> None:
        self.refs = tuple(refs)
        self._root = root
        self._groups = groups
        self._open: dict[tuple[int, bool], Segment] = {}
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.refs)

    def checked(self, number: int) -> Segment:
        """A segment whose bytes are those that the manifest names, and whose numbers were checked.

        Raises:
            CorruptionError: it is damaged or missing.
            StoreAccessError: the object store does not answer.
        """
        return self._get(number, verified=True)

    def glance(self, number: int) -> Segment:
        """A segment that need not have been hashed: good for finding samples and tasks, whose ids tell
        whether they are what was looked for. Costs no more than what is touched.
        """
        return self._get(number, verified=number in self._verified)

    def _get(self, number: int, verified: bool) -> Segment:
        # Two threads may come here (see `CacheReader.warm`), and a lock would not survive a fork.
        key = (number, verified)
        segment = self._open.get(key)
        if segment is None:
            segment = self._open[key] = self._map(number, verified)
            with suppress(KeyError, RuntimeError, StopIteration):
                while len(self._open) > OPEN_SEGMENTS:
                    self._open.pop(next(iter(self._open)))
        return segment

    def _map(self, number: int, verified: bool) -> Segment:
        ref, root = self.refs[number], self._root
        where = root.where(ref.name)
        root.fetch({ref.name: ref.bytes})
        hashing = verified and number not in self._verified
        if root.keeps_copies and not _is_sound(root, ref, hashing):
            # A broken copy is not a broken store: this throws it away, and looks at another.
            root.load(ref.name, lambda data, where: _check_digest(data, where, ref), ref.bytes)
        view = _mapped(root, ref)
        # Hashed in the map, so that no copy of it is made in this process.
        if hashing:
            _check_digest(view, where, ref)
        columns = from_buffer(view, where)
        if not verified:
            return Segment(columns, where)
        if number in self._verified:
            return Segment(columns, where)
        segment = check(columns, self._groups, where)
        _check_ref(segment, ref, where)
        self._verified.add(number)
        return segment


def _mapped(root: Root, ref: SegmentRef) -> mmap.mmap:
    where = root.where(ref.name)
    try:
        with root.local(ref.name).open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CorruptionError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if len(view) != ref.bytes:
        raise CorruptionError(f"{where}: {len(view)} bytes, but the manifest names {ref.bytes}")
    return view


def _is_sound(root: Root, ref: SegmentRef, hashing: bool) -> bool:
    try:
        view = _mapped(root, ref)
        if hashing:
            _check_digest(view, "", ref)
    except CorruptionError:
        return False
    return True


def _check_digest(data: bytes | mmap.mmap, where: str, ref: SegmentRef) -> None:
    if len(data) != ref.bytes or blake3(data).hexdigest()[:32] != ref.digest:
        raise CorruptionError(f"{where}: its content does not hash to its name; the file is damaged")


def _check_ref(segment: Segment, ref: SegmentRef, where: str) -> None:
    """The numbers by which a manifest speaks of a segment are those of its columns."""
    if ref_of(segment, ref.digest, ref.bytes) != ref:
        raise CorruptionError(f"{where}: other tasks and samples than the manifest names")


def ref_of(segment: Segment, segment_digest: str, size: int) -> SegmentRef:
    """What a manifest says of a segment."""
    length = segment.columns["length"]
    if len(segment.dropped):
        length = np.delete(length, segment.dropped)
    return SegmentRef(
        digest=segment_digest,
        bytes=size,
        tasks=segment.tasks,
        samples=len(length),
        rows=int(length.sum(dtype=np.int64)),
        longest=int(segment.columns["length"].max()),
        held=tuple(segment.held()),
    )
