"""One committed task: its files checked on first touch, its features read sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.codec import decode_head, decode_labels, decode_rows, narrow_mask, row_starts
from featurestore.columns import Extent, layouts
from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.identity import SAMPLES
from featurestore.plan import Task
from featurestore.records import SAMPLES_FILE, CommitRecord
from featurestore.root import PARTS, Root
from featurestore.schema import (
    NO_DRAW,
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    LogitsFeatures,
    LogitsSpec,
    Sample,
    TeacherIdentity,
    covers,
)
from featurestore.shard import ShardArray
from featurestore.tables import samples_from_bytes
from featurestore.tail import first_draws, row_shifts

Array = npt.NDArray[Any]


class Group:
    """The arrays of one column group of one task."""

    def __init__(self, root: Root, record: CommitRecord, task: Task, identity: TeacherIdentity) -> None:
        assert record.spec is not None
        self.spec = record.spec
        directory = root.local(f"{bundle_name(record)}/{record.group}")
        extent = Extent.of(task, record.stats, identity)
        self.arrays = {
            name: ShardArray(directory / name, layout) for name, layout in layouts(self.spec, extent).items()
        }
        self._rows = row_starts(np.asarray(task.lengths)).tolist()
        self._entries: list[int] = []
        if isinstance(self.spec, LogitsSpec):
            self._entries = self.arrays["sample_offsets"].read(0, extent.samples + 1).tolist()
            self._vocabulary = self.arrays["vocabulary"].read(0, extent.distinct_ids).astype(np.uint32)
            if int(self._vocabulary.max()) >= identity.vocab_size:
                raise CorruptionError(
                    f"{self.arrays['vocabulary'].path}: ids outside the teacher's vocabulary"
                )

    def read(self, position: int) -> GroupFeatures:
        """The features of the sample at `position` of the task."""
        start, stop = self._rows[position], self._rows[position + 1]
        if isinstance(self.spec, LogitsSpec):
            return self._logits(position, start, stop)
        scale = self.arrays["scale"].read(start, stop) if "scale" in self.arrays else None
        return HiddenFeatures(self.arrays["values"].read(start, stop), scale, self.spec.dtype)

    def _logits(self, position: int, start: int, stop: int) -> LogitsFeatures:
        first, last = self._entries[position], self._entries[position + 1]
        counts = self.arrays["head_count"].read(start, stop).astype(np.uint16)
        path = self.arrays["head_count"].path
        if last - first != int(counts.sum(dtype=np.int64)) or not counts.all():
            raise CorruptionError(f"{path}: head sizes that do not add up to sample_offsets")
        ids = self._ids("head_index", self.arrays["head_index"].read(first, last))
        lse = decode_rows(self.arrays["lse"].read(start, stop))
        gaps, odds = self.arrays["head_gaps"].read(first, last), self.arrays["head_odds"].read(start, stop)
        return LogitsFeatures(
            counts=counts,
            ids=ids,
            logits=decode_head(counts, gaps, odds, lse),
            lse=lse,
            label_logprob=decode_labels(self.arrays["label_logprob"].read(start, stop)),
            entropy=decode_rows(self.arrays["entropy"].read(start, stop)),
            tail_ids=self._tail(start, stop, ids[row_starts(counts)[:-1]]),
        )

    def _tail(self, start: int, stop: int, tops: Array) -> npt.NDArray[np.int32] | None:
        """Draws of rows start..stop; a row that repeats its top id has none."""
        if "tail_index" not in self.arrays:
            return None
        steps = self.arrays["tail_index"].read(start, stop)
        ids = self._ids("tail_index", np.cumsum(steps, axis=1, dtype=np.int64)).astype(np.int32)
        ids[ids[:, 0] == tops] = NO_DRAW
        ids.sort(axis=1)
        return ids

    def _ids(self, name: str, index: Array) -> npt.NDArray[np.uint32]:
        if int(index.max()) >= len(self._vocabulary):
            raise CorruptionError(f"{self.arrays[name].path}: an index outside the task's vocabulary")
        return self._vocabulary[index]


class Bundle:
    """All that is committed of one task. Opens a group when it is first asked for.

    `verified` is shared: the (task, group) pairs whose files were hashed already, so that a bundle which
    is closed and opened again is not hashed again.
    """

    def __init__(
        self,
        root: Root,
        identity: TeacherIdentity,
        task: Task,
        records: Mapping[str, CommitRecord],
        verified: set[tuple[str, str]],
    ) -> None:
        self.task = task
        self.records = records
        self._root = root
        self._identity = identity
        self._verified = verified
        self._groups: dict[str, Group] = {}
        self._samples: list[Sample] | None = None

    def samples(self) -> list[Sample]:
        """Tokens and masks of the task's samples, in order."""
        if self._samples is None:
            if SAMPLES not in self.records:
                raise MissingFeatureError(f"the samples of task {self.task.id} are not committed")
            self._verify(self.records[SAMPLES])
            self._samples = load_samples(self._root, self.records[SAMPLES], self.task)
        return self._samples

    def features(self, position: int, want: GroupSpec) -> GroupFeatures:
        """The features of one sample, from a group that covers `want`, narrowed to it."""
        record = serving(self.records, want)
        if record is None:
            raise MissingFeatureError(f"task {self.task.id} has no column group that serves {want}")
        try:
            found = self._read(record, position)
        except (CorruptionError, StoreFormatError):
            if not self._root.keeps_copies:
                raise
            # The mirror may have been emptied or damaged since it was verified: verify once more, and read.
            self._groups.pop(record.group, None)
            self._verified.discard((self.task.id, record.group))
            with self._root.naming():
                found = self._read(record, position)
        if isinstance(want, LogitsSpec) and isinstance(found, LogitsFeatures) and want != record.spec:
            assert isinstance(record.spec, LogitsSpec)
            return narrow(
                found, want, record.spec.tail, self.samples()[position].tokens if want.tail else None
            )
        return found

    def _read(self, record: CommitRecord, position: int) -> GroupFeatures:
        if record.group not in self._groups:
            self._verify(record)
            self._groups[record.group] = Group(self._root, record, self.task, self._identity)
        return self._groups[record.group].read(position)

    def warm(self, wants: Iterable[GroupSpec]) -> None:
        """Have the files of the samples and of these groups at hand and verified; nothing is decoded.

        May run in one thread while another reads.
        """
        records = {record.group: record for want in wants if (record := serving(self.records, want))}
        for record in (self.records[SAMPLES], *records.values()):
            if (self.task.id, record.group) not in self._verified:
                self._verify(record)

    def _verify(self, record: CommitRecord) -> None:
        key = (self.task.id, record.group)
        check_record(self._root, record, self.task, deep=key not in self._verified)
        self._verified.add(key)


def bundle_name(record: CommitRecord) -> str:
    """parts/<bundle>, the path of a bundle in its store."""
    return f"{PARTS}/{record.bundle}"


def check_extent(record: CommitRecord, task: Task) -> None:
    """StoreFormatError unless the record has the rows and samples of its task."""
    if record.rows != task.rows or record.samples != len(task.lengths):
        raise StoreFormatError(f"commit/{record.group}/{record.task}.json: other sizes than the plan's task")


def check_record(root: Root, record: CommitRecord, task: Task, deep: bool = True) -> None:
    """CorruptionError unless every file of the record has its size and, if `deep`, its committed hash."""
    check_extent(record, task)
    root.check({f"{bundle_name(record)}/{name}": stamp for name, stamp in record.files.items()}, deep)


def read_samples(root: Root, record: CommitRecord, task: Task) -> list[Sample]:
    """The samples of a task from its committed bundle, checked."""
    check_record(root, record, task)
    return load_samples(root, record, task)


def load_samples(root: Root, record: CommitRecord, task: Task) -> list[Sample]:
    """The samples of a task whose file was checked; they have to hash to the plan's ids in any case."""
    name, (size, _) = f"{bundle_name(record)}/{SAMPLES_FILE}", record.files[SAMPLES_FILE]
    return root.load(name, lambda data, where: samples_from_bytes(data, task, where), size)


def serving(records: Mapping[str, CommitRecord], want: GroupSpec) -> CommitRecord | None:
    """The record that serves a request: the very group, else the one with the fewest bytes that covers it."""
    covering = [r for r in records.values() if r.spec is not None and covers(r.spec, want)]
    return min(covering, key=lambda r: (r.spec != want, r.size), default=None)


def narrow(
    features: LogitsFeatures, spec: LogitsSpec, have_tail: int = 0, tokens: Array | None = None
) -> LogitsFeatures:
    """What a capture with the smaller `spec` keeps of these rows.

    With top_p the cut is found from the stored logits, so it can fall one rank beside the capture's own.
    Fewer draws are the first ones of more: `tokens` of the sample tell which they are.
    """
    if spec.tail and features.tail_ids is not None and tokens is not None:
        shifts = row_shifts(tokens, 0, len(tokens), spec.seed)
        chosen = features.tail_ids[first_draws(shifts, have_tail, spec.tail)]
        return replace(features, tail_ids=chosen.reshape(-1, spec.tail))
    keep = narrow_mask(features.counts, features.logits, features.lse, spec.top_k, spec.top_p)
    kept = np.add.reduceat(keep, row_starts(features.counts)[:-1], dtype=np.int64)
    return replace(
        features,
        counts=kept.astype(np.uint16),
        ids=features.ids[keep],
        logits=features.logits[keep],
        tail_ids=None,
    )
