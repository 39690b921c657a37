"""Commit records and manifests: frozen, and validated field by field when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.columns import Stats
from featurestore.format.kinds.table import group_files, group_ids, group_spec_from_json, kind_of
from featurestore.format.schema import MAX_TOKENS, GroupSpec, group_id
from featurestore.identity import (
    BUNDLE_ID,
    DIGEST,
    FILE_NAME,
    HASH,
    RUN_ID,
    SAMPLES,
    TASK_ID,
    check_id,
    check_int,
    digest,
    header,
    seal,
    unseal,
)
from featurestore.storage.protocol import Root

SAMPLES_FILE = "samples.parquet"
MAX_BYTES = 2**50
MAX_STAT = 1e100

Stamp = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run had spent when it had a shard ready: its id, positions, wall-clock seconds, all since its
    start. engine_seconds: until its engines were ready; capture_seconds: in the teacher, after that.
    """

    id: str
    tokens: int = 0
    engine_seconds: float = 0.0
    capture_seconds: float = 0.0

    @classmethod
    def from_json(cls, value: Any, where: str) -> RunCost:
        """Parse and validate; raises StoreFormatError."""
        found = json_object(value, where)
        return cls(
            id=check_id(found.get("id"), RUN_ID, f"{where}: run"),
            tokens=check_int(found.get("tokens"), 1, MAX_BYTES, f"{where}: tokens of the run"),
            engine_seconds=_seconds(found.get("engine_seconds"), where),
            capture_seconds=_seconds(found.get("capture_seconds"), where),
        )


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One column group (or the samples) of one task is complete, in this bundle, as these files.

    group: a group id, or "samples" (then spec is None). files: path relative to the bundle -> (size in
    bytes, XXH3-64 hex). stats: sums over the rows, see `GroupKind.stats`. documents: of
    "samples" only, per sample the keys of `schema.Sample.documents`; empty where none is known. run: what the
    run that wrote it had spent; None for imports, and in records of before.
    """

    task: str
    group: str
    spec: GroupSpec | None
    bundle: str
    rows: int
    samples: int
    files: Mapping[str, Stamp]
    stats: Stats
    documents: tuple[tuple[str, ...], ...] = ()
    run: RunCost | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def to_bytes(self) -> bytes:
        """The content of commit/<group>/<task>.json."""
        return seal(
            {
                **header("commit"),
                "task": self.task,
                "group": self.group,
                "spec": None if self.spec is None else self.spec.to_json(),
                "bundle": self.bundle,
                "rows": self.rows,
                "samples": self.samples,
                "files": {name: list(stamp) for name, stamp in self.files.items()},
                "stats": self.stats,
                **({"documents": [list(keys) for keys in self.documents]} if self.documents else {}),
                **({"run": asdict(self.run)} if self.run else {}),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, group: str, task: str, where: str) -> CommitRecord:
        """Parse and validate the record that lies at commit/<group>/<task>.json."""
        value = unseal(data, where, "commit")
        spec = None if group == SAMPLES else group_spec_from_json(value.get("spec"))
        if value.get("group") != group or value.get("task") != task:
            raise CorruptionError(f"{where}: this record belongs to another task or group")
        if spec is not None and group_id(spec) != group:
            raise StoreFormatError(f"{where}: the spec does not belong to group {group}")
        rows = check_int(value.get("rows"), 1, MAX_TOKENS, f"{where}: rows")
        bundle = check_id(value.get("bundle"), BUNDLE_ID, f"{where}: bundle")
        if not bundle.startswith(f"{task}-"):
            raise StoreFormatError(f"{where}: the bundle belongs to another task")
        samples = check_int(value.get("samples"), 1, rows, f"{where}: samples")
        return cls(
            task=task,
            group=group,
            spec=spec,
            bundle=bundle,
            rows=rows,
            samples=samples,
            files=_files(value.get("files"), spec, group, where),
            stats=_stats(value.get("stats"), spec, rows, where),
            documents=_documents(value.get("documents", []), samples if spec is None else 0, where),
            run=RunCost.from_json(value["run"], where) if "run" in value else None,
        )


@dataclass(frozen=True, kw_only=True)
class FlatManifest:
    """A manifest of format version 1, which is read and no longer written: the tasks of one moment, and the
    exact commit record of each of their groups.

    spec: digest of SPEC.json. plans, teacher: names of the plan and teacher-listing files. groups: id ->
    spec. tasks: task id -> {group id or "samples": digest of the commit record}. stats: group id -> the sums
    of `sum_stats` over its tasks; groups without any are left out, as all are in manifests of before.
    """

    spec: str
    plans: tuple[str, ...]
    teacher: tuple[str, ...]
    groups: Mapping[str, GroupSpec]
    tasks: Mapping[str, Mapping[str, str]]
    stats: Mapping[str, Stats] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """How many commit records it names."""
        return sum(len(groups) for groups in self.tasks.values())

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> FlatManifest:
        """Validate an unsealed record; order of tasks is sorted by id. Raises StoreFormatError."""
        groups = {g: group_spec_from_json(s) for g, s in json_object(value.get("groups"), where).items()}
        if any(group_id(spec) != name for name, spec in groups.items()):
            raise StoreFormatError(f"{where}: a spec does not belong to its group")
        known = {*groups, SAMPLES}
        tasks: dict[str, dict[str, str]] = {}
        for task, named in json_object(value.get("tasks"), where).items():
            records = json_object(named, where)
            if not set(records) <= known or SAMPLES not in records:
                raise StoreFormatError(f"{where}: task {str(task)[:40]} names unknown groups or no samples")
            tasks[check_id(task, TASK_ID, where)] = {
                g: check_id(d, DIGEST, where) for g, d in records.items()
            }
        return cls(
            spec=check_id(value.get("spec"), DIGEST, where),
            plans=file_names(value.get("plans"), where),
            teacher=file_names(value.get("teacher"), where),
            groups=groups,
            tasks=tasks,
            stats=sums_of_groups(value.get("stats", {}), groups, where),
        )


def commit_name(group: str, task: str) -> str:
    """commit/<group>/<task>.json, the path of a commit record in its store."""
    if group != SAMPLES:
        check_id(group, group_ids(), "commit")
    return f"commit/{group}/{check_id(task, TASK_ID, 'commit')}.json"


def read_commit(root: Root, group: str, task: str, expected: str | None = None) -> CommitRecord:
    """Read one commit record; with `expected`, CorruptionError unless its digest is that."""
    return read_commit_and_digest(root, group, task, expected)[0]


def read_commit_and_digest(
    root: Root, group: str, task: str, expected: str | None = None
) -> tuple[CommitRecord, str]:
    """A commit record and the digest of its bytes, by which manifests name it."""

    def parse(data: bytes, where: str) -> tuple[CommitRecord, str]:
        found = digest(data)
        if expected is not None and found != expected:
            raise CorruptionError(
                f"{where}: not the commit record that the manifest names; the file is damaged"
            )
        return CommitRecord.from_bytes(data, group, task, where), found

    return root.load(commit_name(group, task), parse)


def files_of(spec: GroupSpec | None, group: str) -> list[str]:
    """The files of a group (or of the samples) relative to the bundle. No other name is ever accepted."""
    return [SAMPLES_FILE] if spec is None else [f"{group}/{name}" for name in group_files(spec)]


def sum_stats(tasks: Iterable[Stats]) -> Stats:
    """The stats of a group's tasks added up.

    `distinct_ids` is no sum over rows and left out. Tasks without stats count for nothing.
    """
    found: dict[str, list[int | float]] = {}
    for stats in tasks:
        for name, number in stats.items():
            found.setdefault(name, []).append(number)
    found.pop("distinct_ids", None)
    return {
        name: math.fsum(numbers) if any(type(number) is float for number in numbers) else sum(numbers)
        for name, numbers in sorted(found.items())
    }


def unrecorded(costs: Iterable[RunCost], recorded: Iterable[Mapping[str, Any]]) -> list[RunCost]:
    """What each run spent that has committed something and is not among `recorded`, the provenance records;
    costs: one per run.

    Such a run was stopped, or is still at work. What it spent after its last shard is not known.
    """
    known = {run for one in recorded if isinstance(run := one.get("run"), str)}
    return sorted((run for run in costs if run.id not in known), key=lambda run: run.capture_seconds)


def json_object(value: Any, where: str) -> dict[str, Any]:
    """A JSON object; StoreFormatError for anything else."""
    if not isinstance(value, dict):
        raise StoreFormatError(f"{where}: expected a JSON object, found {str(value)[:80]}")
    return value


def file_names(value: Any, where: str) -> tuple[str, ...]:
    """A list of file names; StoreFormatError for anything else."""
    if not isinstance(value, list):
        raise StoreFormatError(f"{where}: expected a list of file names, found {str(value)[:80]}")
    return tuple(check_id(name, FILE_NAME, where) for name in value)


def _files(value: Any, spec: GroupSpec | None, group: str, where: str) -> dict[str, Stamp]:
    files = json_object(value, where)
    if set(files) != set(files_of(spec, group)):
        raise StoreFormatError(f"{where}: names other files than group {group} has")
    stamps: dict[str, Stamp] = {}
    for name, stamp in files.items():
        if not isinstance(stamp, list) or len(stamp) != 2:
            raise StoreFormatError(f"{where}: {name} needs [size, hash]")
        size = check_int(stamp[0], 1, MAX_BYTES, f"{where}: size of {name}")
        stamps[name] = (size, check_id(stamp[1], HASH, f"{where}: hash of {name}"))
    return stamps


def _documents(value: Any, samples: int, where: str) -> tuple[tuple[str, ...], ...]:
    """Keys per sample; empty, or of all `samples`."""
    if not isinstance(value, list) or len(value) not in (0, samples):
        raise StoreFormatError(f"{where}: documents need a list for each sample")
    if not all(isinstance(keys, list) for keys in value):
        raise StoreFormatError(f"{where}: the documents of a sample are a list of keys")
    return tuple(tuple(check_id(key, HASH, f"{where}: documents") for key in keys) for keys in value)


def _stats(value: Any, spec: GroupSpec | None, rows: int, where: str) -> Stats:
    stats = _numbers(value, where)
    kind = None if spec is None else kind_of(spec)
    names = [] if kind is None or spec is None else kind.stat_names(spec)
    least = 0 if kind is None or spec is None else kind.least_stats(spec)
    if sorted(stats) not in (names, names[:least]):
        raise StoreFormatError(f"{where}: missing or unknown stats")
    if kind is not None and spec is not None and stats:
        kind.check_stats(spec, stats, rows, where)
    return stats


def _numbers(value: Any, where: str) -> Stats:
    stats = json_object(value, where)
    for name, number in stats.items():
        if type(number) not in (int, float) or not abs(number) <= MAX_STAT:
            raise StoreFormatError(f"{where}: stat {name[:40]} is no number")
    return stats


def _seconds(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_STAT:
        raise StoreFormatError(f"{where}: the seconds of the run are no number")
    return float(value)


def sums_of_groups(value: Any, groups: Mapping[str, Any], where: str) -> dict[str, Stats]:
    """Sums of stats by group; StoreFormatError for anything else, and for a group that is not in `groups`."""
    sums = {name: _numbers(numbers, where) for name, numbers in json_object(value, where).items()}
    if not set(sums) <= set(groups):
        raise StoreFormatError(f"{where}: stats of groups that it does not list")
    return sums
