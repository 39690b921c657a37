"""One committed task: its files checked on first touch, its features read sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.codec import (
    decode_entropy,
    decode_head,
    decode_labels,
    decode_rows,
    narrow_mask,
    row_starts,
)
from featurestore.columns import Extent, layouts
from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.files import check_file, read_bounded
from featurestore.identity import SAMPLES
from featurestore.plan import Task
from featurestore.records import SAMPLES_FILE, CommitRecord
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

    def __init__(self, store: Path, record: CommitRecord, task: Task, identity: TeacherIdentity) -> None:
        assert record.spec is not None
        self.spec = record.spec
        directory = bundle_path(store, record) / record.group
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
            entropy=self._entropy(start, stop),
            tail_ids=self._tail(start, stop, ids[row_starts(counts)[:-1]]),
        )

    def _entropy(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Entropy of rows start..stop; NaN where a partial group does not know it."""
        codes = self.arrays["entropy"].read(start, stop)
        assert isinstance(self.spec, LogitsSpec)
        return decode_entropy(codes) if self.spec.partial else decode_rows(codes)

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
        store: Path,
        identity: TeacherIdentity,
        task: Task,
        records: Mapping[str, CommitRecord],
        verified: set[tuple[str, str]],
    ) -> None:
        self.task = task
        self.records = records
        self._store = store
        self._identity = identity
        self._verified = verified
        self._groups: dict[str, Group] = {}
        self._samples: list[Sample] | None = None

    def samples(self) -> list[Sample]:
        """Tokens and masks of the task's samples, in order."""
        if self._samples is None:
            if SAMPLES not in self.records:
                raise MissingFeatureError(f"the samples of task {self.task.id} are not committed")
            self._samples = read_samples(self._store, self.records[SAMPLES], self.task)
        return self._samples

    def features(self, position: int, want: GroupSpec) -> GroupFeatures:
        """The features of one sample, from a group that covers `want`, narrowed to it."""
        record = serving(self.records, want)
        if record is None:
            raise MissingFeatureError(f"task {self.task.id} has no column group that serves {want}")
        if record.group not in self._groups:
            key = (self.task.id, record.group)
            check_record(self._store, record, self.task, deep=key not in self._verified)
            self._verified.add(key)
            self._groups[record.group] = Group(self._store, record, self.task, self._identity)
        found = self._groups[record.group].read(position)
        if isinstance(want, LogitsSpec) and isinstance(found, LogitsFeatures) and want != record.spec:
            assert isinstance(record.spec, LogitsSpec)
            return narrow(
                found, want, record.spec.tail, self.samples()[position].tokens if want.tail else None
            )
        return found


def bundle_path(store: Path, record: CommitRecord) -> Path:
    """parts/<bundle>."""
    return store / "parts" / record.bundle


def check_extent(record: CommitRecord, task: Task) -> None:
    """StoreFormatError unless the record has the rows and samples of its task."""
    if record.rows != task.rows or record.samples != len(task.lengths):
        raise StoreFormatError(f"commit/{record.group}/{record.task}.json: other sizes than the plan's task")


def check_record(store: Path, record: CommitRecord, task: Task, deep: bool = True) -> None:
    """CorruptionError unless every file of the record has its size and, if `deep`, its committed hash."""
    check_extent(record, task)
    for name, stamp in record.files.items():
        check_file(bundle_path(store, record) / name, stamp, deep)


def read_samples(store: Path, record: CommitRecord, task: Task) -> list[Sample]:
    """The samples of a task from its committed bundle, checked."""
    check_record(store, record, task)
    path = bundle_path(store, record) / SAMPLES_FILE
    return samples_from_bytes(read_bounded(path, record.files[SAMPLES_FILE][0]), task, path)


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
