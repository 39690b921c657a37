"""Commit records become columns of segments, and segments become fewer. Pure functions: no files.

A segment is never changed. A task of which another column group is committed moves, with all its records,
into a new segment, and the others of its old one are written again without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featurestore.catalogue.columns import LAYOUT, Array, empty
from featurestore.catalogue.segment import Segment, keys_of, stat_names
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord
from featurestore.identity import SAMPLES

# A segment of that many samples has about 12 MiB: what is read and hashed when a reader first touches it.
SEGMENT_SAMPLES = 2**18

_OF_SAMPLE = ("sample", "length")
_OF_RECORD = ("record_group", "record_digest", "record_bundle")
NewColumns = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class ListedTask:
    """A task and what is committed of it: group id or "samples" -> (record, digest of its bytes)."""

    task: Task
    records: Mapping[str, tuple[CommitRecord, str]]

    @property
    def complete(self) -> bool:
        """Its samples are committed, so that a manifest can list it."""
        return SAMPLES in self.records


def columns_of(listed: Sequence[ListedTask]) -> NewColumns:
    """The columns of these tasks, which have at least their samples committed, in this order."""
    groups = sorted({group for one in listed for group in one.records})
    number = {group: i for i, group in enumerate(groups)}
    records = [one.records[group] for one in listed for group in sorted(one.records)]
    documents = [keys for one in listed for keys in _documents(one)]
    files = [record.files[name] for record, _ in records for name in sorted(record.files)]
    stats = [[record.stats[n] for n in stat_names(record.spec) if n in record.stats] for record, _ in records]
    tasks = [one.task for one in listed]
    return {
        "group": _padded(groups),
        "task": _raw((task.id for task in tasks), 8),
        "sample_start": _starts(len(task.lengths) for task in tasks),
        "record_start": _starts(len(one.records) for one in listed),
        "sample": _raw((sample for task in tasks for sample in task.sample_ids), 16),
        "length": np.array([length for task in tasks for length in task.lengths], np.int32),
        "document_start": _starts(map(len, documents)),
        "document": _raw((key for keys in documents for key in keys), 8),
        "record_group": np.array([number[record.group] for record, _ in records], np.int16),
        "record_digest": _raw((seal for _, seal in records), 16),
        "record_bundle": _raw((record.bundle.partition("-")[2] for record, _ in records), 6),
        "file_start": _starts(len(record.files) for record, _ in records),
        "file_size": np.array([size for size, _ in files], np.int64),
        "file_hash": _raw((value for _, value in files), 8),
        "stat_start": _starts(map(len, stats)),
        "stat": np.array([value for values in stats for value in values], np.float64),
        "dropped": empty("dropped"),
        "plan": empty("plan"),
    }


def finished(columns: NewColumns) -> NewColumns:
    """The columns with the index of sample ids, ready to be written."""
    key, place = keys_of(columns["sample"])
    return {**columns, "key": key, "key_place": place.astype(np.int32)}


def taken(segment: Segment, rows: Array) -> NewColumns:
    """The columns of some tasks of a segment, ascending rows; all its plans stay."""
    c = segment.columns
    samples = _members(c["sample_start"], rows)
    records = _members(c["record_start"], rows)
    picked = {"task": rows, **dict.fromkeys(_OF_SAMPLE, samples), **dict.fromkeys(_OF_RECORD, records)}
    picked["document"] = _members(c["document_start"], samples)
    picked |= dict.fromkeys(("file_size", "file_hash"), _members(c["file_start"], records))
    picked["stat"] = _members(c["stat_start"], records)
    out = {name: c[name][where] for name, where in picked.items()}
    for name, where in (
        *(("sample", rows), ("record", rows), ("document", samples)),
        *(("file", records), ("stat", records)),
    ):
        out[f"{name}_start"] = _starts(np.diff(c[f"{name}_start"])[where])
    dropped = np.zeros(segment.places, bool)
    dropped[segment.dropped] = True
    return {
        **out,
        "group": c["group"],
        "dropped": np.flatnonzero(dropped[samples]).astype(np.int32),
        "plan": c["plan"],
    }


def joined(parts: Sequence[Mapping[str, Array]]) -> NewColumns:
    """The columns of several segments, one after the other."""
    names = sorted({bytes(name) for part in parts for name in part["group"]})
    out: NewColumns = {"group": np.frombuffer(b"".join(names), np.uint8).reshape(-1, int(LAYOUT["group"]))}
    for name in (
        "task",
        "sample",
        "length",
        "document",
        *_OF_RECORD[1:],
        "file_size",
        "file_hash",
        "stat",
        "plan",
    ):
        out[name] = np.concatenate([part[name] for part in parts])
    number = {name: i for i, name in enumerate(names)}
    maps = [np.array([number[bytes(name)] for name in part["group"]], np.int16) for part in parts]
    out["record_group"] = np.concatenate(
        [m[part["record_group"]] for m, part in zip(maps, parts, strict=True)]
    )
    for name in ("sample", "record", "document", "file", "stat"):
        out[f"{name}_start"] = _starts(np.concatenate([np.diff(part[f"{name}_start"]) for part in parts]))
    before = _starts(len(part["length"]) for part in parts)
    out["dropped"] = np.concatenate(
        [part["dropped"] + start for part, start in zip(parts, before[:-1], strict=True)]
    ).astype(np.int32)
    return out


def pieces(listed: Sequence[ListedTask], most: int = SEGMENT_SAMPLES) -> list[list[ListedTask]]:
    """Tasks in order, cut into segments of at most `most` samples; a larger task is alone."""
    out: list[list[ListedTask]] = []
    samples = 0
    for one in listed:
        if not out or samples + len(one.task.lengths) > most:
            out.append([])
            samples = 0
        out[-1].append(one)
        samples += len(one.task.lengths)
    return out


def to_join(sizes: Sequence[int], most: int = SEGMENT_SAMPLES) -> list[range]:
    """Which runs of neighbouring segments, of these numbers of samples, become one segment each.

    Read from the end, a segment joins those behind it while it is at most twice as large as they are
    together. So sizes at least double from the end on, up to `most`: their number is that of the full
    segments and a logarithm, and each task is written again a logarithm of times.
    """
    runs: list[range] = []
    end = len(sizes)
    while end > 0:
        start, total = end - 1, sizes[end - 1]
        while start > 0 and sizes[start - 1] <= 2 * total and sizes[start - 1] + total <= most:
            start -= 1
            total += sizes[start]
        if end - start > 1:
            runs.append(range(start, end))
        end = start
    return runs[::-1]


def _documents(one: ListedTask) -> Sequence[tuple[str, ...]]:
    record = one.records[SAMPLES][0]
    return record.documents or ((),) * len(one.task.lengths)


def _members(start: Array, rows: Array) -> Array:
    """int64: the numbers from start[r] to start[r + 1] - 1, of each r in `rows`, one after the other."""
    begin = start[rows]
    counts = start[rows + 1] - begin
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    members: Array = np.arange(total) + np.repeat(begin - (ends - counts), counts)
    return members


def _starts(counts: Iterable[int] | Array) -> Array:
    counts = counts if isinstance(counts, np.ndarray) else np.fromiter(counts, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _raw(values: Iterable[str], width: int) -> Array:
    return np.frombuffer(bytes.fromhex("".join(values)), np.uint8).reshape(-1, width)


def _padded(names: Sequence[str]) -> Array:
    width = int(LAYOUT["group"])
    joined_names = b"".join(name.encode("ascii").ljust(width, b"\0") for name in names)
    return np.frombuffer(joined_names, np.uint8).reshape(-1, width)
