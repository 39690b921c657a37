"""Manifests of format version 2: a small record that names segments, and the names that find the newest one.

Nothing is read to choose a manifest: the file names in `heads/` say how much each lists. A head stands for a
manifest until one that lists all of it, and more, has a head of its own; then it is removed. So there is one,
but for moments at which several writers publish; no manifest and no segment is ever removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.columns import Stats
from featurestore.format.directory import manifest_digests, manifest_name
from featurestore.format.kinds.table import group_spec_from_json
from featurestore.format.records import (
    MAX_BYTES,
    CommitRecord,
    FlatManifest,
    RunCost,
    file_names,
    json_object,
    sum_stats,
    sums_of_groups,
)
from featurestore.format.schema import MAX_TOKENS, GroupSpec, group_id
from featurestore.identity import DIGEST, SAMPLES, check_id, check_int, digest, header, seal, unseal
from featurestore.storage.protocol import HEADS, SEGMENTS, Root

# A segment is mapped, so that it takes address space and no memory.
MAX_SEGMENT_BYTES = 2**34
MAX_TASKS = 2**31
_HEAD = re.compile(r"([0-9]{12})-([0-9]{6})-([0-9a-f]{32})")


@dataclass(frozen=True, kw_only=True)
class SegmentRef:
    """One segment of a manifest. bytes: of its file; samples, rows: without those that are dropped; longest:
    positions of its longest sample; held: the sets of column groups that its tasks have, "samples" left out.
    """

    digest: str
    bytes: int
    tasks: int
    samples: int
    rows: int
    longest: int
    held: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """segments/<digest>.arrow."""
        return segment_name(self.digest)

    @classmethod
    def from_json(cls, value: Any, groups: Iterable[str], where: str) -> SegmentRef:
        """Parse and validate; raises StoreFormatError."""
        found = json_object(value, where)
        held, known = found.get("held"), set(groups)
        if not isinstance(held, list) or not held or not all(isinstance(one, list) for one in held):
            raise StoreFormatError(f"{where}: a segment without the column groups of its tasks")
        if any(not isinstance(group, str) or group not in known for one in held for group in one):
            raise StoreFormatError(f"{where}: a segment names a column group that the manifest does not list")
        tasks = check_int(found.get("tasks"), 1, MAX_TASKS, f"{where}: tasks of a segment")
        rows = check_int(found.get("rows"), 0, tasks * MAX_TOKENS, f"{where}: rows of a segment")
        return cls(
            digest=check_id(found.get("digest"), DIGEST, where),
            bytes=check_int(found.get("bytes"), 1, MAX_SEGMENT_BYTES, f"{where}: bytes of a segment"),
            tasks=tasks,
            samples=check_int(found.get("samples"), 0, rows, f"{where}: samples of a segment"),
            rows=rows,
            longest=check_int(found.get("longest"), 1, MAX_TOKENS, f"{where}: longest sample of a segment"),
            held=tuple(tuple(one) for one in held),
        )


@dataclass(frozen=True, kw_only=True)
class GroupTotals:
    """Sums over the commit records of one group (or "samples"). files: bytes by array, see `array_of`."""

    tasks: int = 0
    rows: int = 0
    files: Mapping[str, int] = field(default_factory=dict)
    stats: Stats = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def with_records(self, records: Iterable[CommitRecord]) -> GroupTotals:
        """The sums with these added."""
        records = list(records)
        files = dict(self.files)
        for record in records:
            for name, (size, _) in record.files.items():
                files[array_of(name)] = files.get(array_of(name), 0) + size
        return GroupTotals(
            tasks=self.tasks + len(records),
            rows=self.rows + sum(record.rows for record in records),
            files=dict(sorted(files.items())),
            stats=sum_stats([self.stats, *(record.stats for record in records)]),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a reader trusts: the segments of one moment.

    spec: digest of SPEC.json. teacher: names of the teacher-listing files. groups: id -> spec. segments: in
    the order of the samples. totals: group id or "samples" -> sums. lengths: tasks' samples by the power of
    two below their length, dropped ones included. runs: what each run had spent at its last record.
    """

    spec: str
    teacher: tuple[str, ...]
    groups: Mapping[str, GroupSpec]
    segments: tuple[SegmentRef, ...]
    totals: Mapping[str, GroupTotals]
    lengths: Mapping[int, int]
    runs: Mapping[str, RunCost]

    @property
    def tasks(self) -> int:
        """How many tasks it lists."""
        return sum(ref.tasks for ref in self.segments)

    @property
    def samples(self) -> int:
        """How many samples it lists, each once."""
        return sum(ref.samples for ref in self.segments)

    @property
    def records(self) -> int:
        """How many commit records it lists."""
        return sum(totals.tasks for totals in self.totals.values())

    @property
    def stats(self) -> dict[str, Stats]:
        """Group id -> the sums of its stats, of groups that have any."""
        return {group: dict(totals.stats) for group, totals in self.totals.items() if totals.stats}

    @cached_property
    def digest(self) -> str:
        """32 hex digits, the identity of what a training run read."""
        return digest(self.to_bytes())

    @property
    def head(self) -> str:
        """The name in `heads/` that stands for it."""
        return f"{self.records:012d}-{len(self.teacher):06d}-{self.digest}"

    def to_bytes(self) -> bytes:
        """The content of MANIFEST-<digest>.json."""
        return seal(
            {
                **header("manifest"),
                "spec": self.spec,
                "teacher": list(self.teacher),
                "groups": {name: spec.to_json() for name, spec in self.groups.items()},
                "segments": [
                    {**asdict(ref), "held": [list(one) for one in ref.held]} for ref in self.segments
                ],
                "totals": {name: asdict(totals) for name, totals in self.totals.items()},
                "lengths": {str(power): count for power, count in self.lengths.items()},
                "runs": {
                    run: {name: value for name, value in asdict(cost).items() if name != "id"}
                    for run, cost in self.runs.items()
                },
            }
        )

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> Manifest:
        """Validate an unsealed record; raises StoreFormatError."""
        groups = {g: group_spec_from_json(s) for g, s in json_object(value.get("groups"), where).items()}
        if any(group_id(spec) != name for name, spec in groups.items()):
            raise StoreFormatError(f"{where}: a spec does not belong to its group")
        segments = value.get("segments")
        if not isinstance(segments, list) or not segments:
            raise StoreFormatError(f"{where}: no segments")
        refs = tuple(SegmentRef.from_json(one, groups, where) for one in segments)
        if len({ref.digest for ref in refs}) != len(refs):
            raise StoreFormatError(f"{where}: a segment twice")
        lengths = json_object(value.get("lengths"), where)
        if any(not re.fullmatch("[0-9]|1[0-9]|2[0-4]", power) for power in lengths):
            raise StoreFormatError(f"{where}: lengths that no sample has")
        runs = json_object(value.get("runs"), where)
        return cls(
            spec=check_id(value.get("spec"), DIGEST, where),
            teacher=file_names(value.get("teacher"), where),
            groups=groups,
            segments=refs,
            totals=_totals(json_object(value.get("totals"), where), groups, where),
            lengths={int(p): check_int(count, 1, MAX_BYTES, where) for p, count in lengths.items()},
            runs={
                run: RunCost.from_json({**json_object(cost, where), "id": run}, where)
                for run, cost in runs.items()
            },
        )


def array_of(file: str) -> str:
    """The array that a file of a bundle belongs to: <group id>/<array>/..., <group id>/zarr.json, or
    samples.parquet.
    """
    parts = file.split("/")
    return parts[1] if len(parts) > 2 else parts[-1]


def segment_name(segment_digest: str) -> str:
    """segments/<digest>.arrow, the path of a segment in its store."""
    return f"{SEGMENTS}/{check_id(segment_digest, DIGEST, 'segment')}.arrow"


def read_manifest(root: Root, manifest_digest: str) -> Manifest | FlatManifest:
    """A manifest of either version, checked against its name."""

    def parse(data: bytes, where: str) -> Manifest | FlatManifest:
        value = unseal(data, where, "manifest")
        if digest(data) != manifest_digest:
            raise CorruptionError(f"{where}: its content does not hash to its name")
        return (
            FlatManifest.from_json(value, where)
            if value["version"] == 1
            else Manifest.from_json(value, where)
        )

    return root.load(manifest_name(manifest_digest), parse)


def head_names(root: Root) -> list[str]:
    """The heads of a store, the one of the fullest manifest last."""
    return [name for name in root.names(HEADS) if _HEAD.fullmatch(name)]


def digest_of_head(name: str) -> str:
    """The digest of the manifest that a head stands for."""
    return name.rpartition("-")[2]


def fullest_manifest(root: Root) -> str | None:
    """Digest of the manifest with the most commit records, and of those with the most teacher listings: the
    newest one of a store that only grows. None where there is none.

    The names of heads tell; in a store that has none, manifests of version 1 are read.
    """
    heads = head_names(root)
    if heads:
        read_head(root, heads[-1])
        return digest_of_head(heads[-1])

    def size(manifest_digest: str) -> tuple[int, int, str]:
        manifest = read_manifest(root, manifest_digest)
        return manifest.records, len(manifest.teacher), manifest_digest

    return max(manifest_digests(root), key=size, default=None)


def read_head(root: Root, name: str) -> Manifest:
    """The manifest of a head; CorruptionError where it does not list what the name says."""
    manifest = read_manifest(root, digest_of_head(name))
    if not isinstance(manifest, Manifest) or manifest.head != name:
        raise CorruptionError(f"{root.where(f'{HEADS}/{name}')}: its manifest lists something else")
    return manifest


def check_head(name: str, data: bytes, where: str) -> None:
    """CorruptionError unless this is the content of a head."""
    if data != head_bytes(digest_of_head(name)):
        raise CorruptionError(f"{where}: not the digest that its name ends in; the file is damaged")


def head_bytes(manifest_digest: str) -> bytes:
    """The content of a head: the digest, for who looks at it, and a newline."""
    return f"{manifest_digest}\n".encode()


def grown(totals: Mapping[str, GroupTotals], records: Iterable[CommitRecord]) -> dict[str, GroupTotals]:
    """The totals with these records added."""
    by_group: dict[str, list[CommitRecord]] = {}
    for record in records:
        by_group.setdefault(record.group, []).append(record)
    more = {g: totals.get(g, GroupTotals()).with_records(found) for g, found in by_group.items()}
    return dict(sorted({**totals, **more}.items()))


def latest_runs(costs: Iterable[RunCost]) -> dict[str, RunCost]:
    """Of each run the cost that it had at its last record."""
    return dict(
        sorted({cost.id: cost for cost in sorted(costs, key=lambda cost: cost.capture_seconds)}.items())
    )


def _totals(value: dict[str, Any], groups: Mapping[str, GroupSpec], where: str) -> dict[str, GroupTotals]:
    if set(value) != {*groups, SAMPLES}:
        raise StoreFormatError(f"{where}: totals of other groups than it lists")
    out: dict[str, GroupTotals] = {}
    for group, found in value.items():
        sums = json_object(found, where)
        files = json_object(sums.get("files"), where)
        out[group] = GroupTotals(
            tasks=check_int(sums.get("tasks"), 1, MAX_TASKS, where),
            rows=check_int(sums.get("rows"), 1, MAX_BYTES, where),
            files={name: check_int(size, 1, MAX_BYTES * MAX_TASKS, where) for name, size in files.items()},
            stats=sums_of_groups({group: sums.get("stats")}, {group: None}, where)[group],
        )
    return out


def with_teacher(manifest: Manifest, teacher: Iterable[str]) -> Manifest:
    """The same with these teacher listings."""
    return replace(manifest, teacher=tuple(teacher))
