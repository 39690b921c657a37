"""One segment: what is committed of some thousand tasks, as columns that lie in a mapped file.

T tasks, N samples, R commit records. All numbers are checked at once when a segment is opened; what belongs
to one task is taken out, and checked against the task's own id, when that task is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from featurestore.catalogue.columns import Array, Columns
from featurestore.catalogue.views import Without
from featurestore.errors import CorruptionError, FeatureStoreError
from featurestore.format.columns import Stats
from featurestore.format.kinds.table import group_ids, kind_of
from featurestore.format.plan import Task
from featurestore.format.records import MAX_BYTES, MAX_STAT, CommitRecord, files_of
from featurestore.format.schema import MAX_TOKENS, GroupSpec
from featurestore.identity import SAMPLES

# Stats that are counts; a column of float64 holds them exactly.
_COUNTS = ("entries", "distinct_ids", "labels")
Places = npt.NDArray[np.int64]
# Samples, and tasks, that are looked at together: what is allocated for a check stays with the process.
_AT_ONCE, _TASKS_AT_ONCE = 2**14, 2**8


def stat_names(spec: GroupSpec | None) -> list[str]:
    """The stats of a record, in the order in which a segment holds them."""
    return kind_of(spec).stat_names(spec) if spec else []


class Segment:
    """The tasks of one segment by their rows 0 to T - 1, its samples by their places 0 to N - 1.

    columns: of a file that was checked. A sample that an earlier row of the manifest holds as well is
    *dropped*: it keeps its place, and is no sample of the manifest.
    """

    def __init__(self, columns: Columns, where: str) -> None:
        self.columns = columns
        self.where = where
        self.dropped: Places = columns["dropped"].astype(np.int64)
        self.groups = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in columns["group"]]
        self.kept = Without(self.places, self.dropped)
        self._rows: tuple[Array, Array] | None = None

    @property
    def tasks(self) -> int:
        """How many tasks it holds."""
        return len(self.columns["task"])

    @property
    def places(self) -> int:
        """How many samples its tasks have, dropped ones included."""
        return len(self.columns["length"])

    def task_id(self, row: int) -> str:
        """Id of a task."""
        return bytes(self.columns["task"][row]).hex()

    def span(self, row: int) -> tuple[int, int]:
        """First place of a task's samples, and the one behind its last."""
        start = self.columns["sample_start"]
        return int(start[row]), int(start[row + 1])

    def row_of(self, place: int) -> int:
        """The row of the task that holds the sample at a place."""
        return int(np.searchsorted(self.columns["sample_start"], place, side="right")) - 1

    def task(self, row: int) -> Task:
        """A task; CorruptionError unless its samples hash to its id."""
        start, end = self.span(row)
        raw = self.columns["sample"][start:end].tobytes().hex()
        ids = tuple(raw[i : i + 32] for i in range(0, len(raw), 32))
        try:
            task = Task(ids, tuple(self.columns["length"][start:end].tolist()))
        except FeatureStoreError as error:
            raise CorruptionError(f"{self.where}: {error}") from None
        if task.id != self.task_id(row):
            raise CorruptionError(
                f"{self.where}: samples that do not hash to the id of task {self.task_id(row)}"
            )
        return task

    def documents(self, place: int) -> tuple[str, ...]:
        """Keys of the documents of the sample at a place."""
        start = self.columns["document_start"]
        keys = self.columns["document"][int(start[place]) : int(start[place + 1])]
        return tuple(bytes(key).hex() for key in keys)

    def bundles(self) -> set[str]:
        """The bundles that its records name."""
        row = np.repeat(np.arange(self.tasks), np.diff(self.columns["record_start"]))
        named = np.concatenate([self.columns["task"][row], self.columns["record_bundle"]], axis=1)
        hexed = (bytes(name).hex() for name in np.unique(named, axis=0))
        return {f"{name[:16]}-{name[16:]}" for name in hexed}

    def record_digests(self, row: int) -> dict[str, str]:
        """Group id or "samples" -> digest of the commit record, of one task."""
        c = self.columns
        numbers = range(int(c["record_start"][row]), int(c["record_start"][row + 1]))
        return {self.groups[int(c["record_group"][n])]: bytes(c["record_digest"][n]).hex() for n in numbers}

    def records(self, row: int, specs: Mapping[str, GroupSpec]) -> dict[str, CommitRecord]:
        """Group id or "samples" -> what its commit record says, but for the cost of the run."""
        c, task = self.columns, self.task_id(row)
        start, end = self.span(row)
        rows = int(c["length"][start:end].sum(dtype=np.int64))
        found: dict[str, CommitRecord] = {}
        for number in range(int(c["record_start"][row]), int(c["record_start"][row + 1])):
            group = self.groups[int(c["record_group"][number])]
            spec = None if group == SAMPLES else specs[group]
            documents = tuple(self.documents(place) for place in range(start, end)) if spec is None else ()
            first, last = int(c["file_start"][number]), int(c["file_start"][number + 1])
            sizes = c["file_size"][first:last].tolist()
            hashes = [bytes(value).hex() for value in c["file_hash"][first:last]]
            found[group] = CommitRecord(
                task=task,
                group=group,
                spec=spec,
                bundle=f"{task}-{bytes(c['record_bundle'][number]).hex()}",
                rows=rows,
                samples=end - start,
                files=dict(zip(sorted(files_of(spec, group)), zip(sizes, hashes, strict=True), strict=True)),
                stats=self._stats(number, spec, rows),
                documents=documents if any(documents) else (),
            )
        return found

    def held(self) -> list[tuple[str, ...]]:
        """The sets of column groups that its tasks have, "samples" left out, sorted."""
        has = np.zeros((self.tasks, len(self.groups)), bool)
        row = np.repeat(np.arange(self.tasks), np.diff(self.columns["record_start"]))
        has[row, self.columns["record_group"]] = True
        sets = (
            [g for g, there in zip(self.groups, one, strict=True) if there] for one in np.unique(has, axis=0)
        )
        return sorted(tuple(sorted(group for group in one if group != SAMPLES)) for one in sets)

    def rows_of(self, ids: Array) -> Places:
        """int64 [m]: the row of each task, -1 where there is none; ids: uint8 [m, 8]."""
        if self._rows is None:
            numbers = _numbers(self.columns["task"])
            order = np.argsort(numbers, kind="stable")
            self._rows = numbers[order], order
        numbers, order = self._rows
        wanted = _numbers(ids)
        place = np.minimum(np.searchsorted(numbers, wanted), max(len(numbers) - 1, 0))
        found: Places = np.where(numbers[place] == wanted, order[place], -1).astype(np.int64)
        return found

    def find(self, ids: Array) -> Places:
        """int64 [m]: the places of samples, -1 for those that are not here; ids: uint8 [m, 16].

        Of a sample that is here more than once the place that is not dropped, where there is one.
        """
        keys, places = self.columns["key"], self.columns["key_place"]
        found = np.full(len(ids), -1, np.int64)
        wanted = _numbers(ids)
        at = np.searchsorted(keys, wanted)
        left = np.arange(len(ids))
        while len(left):
            left = left[at[left] < len(keys)]
            left = left[keys[at[left]] == wanted[left]]
            place = places[at[left]].astype(np.int64)
            sound = (place >= 0) & (place < self.places)
            left, place = left[sound], place[sound]
            same = (self.columns["sample"][place] == ids[left]).all(axis=1)
            kept = same & ~np.isin(place, self.dropped)
            found[left[same]] = place[same]
            left = left[~kept]
            at[left] += 1
        return found

    def _stats(self, number: int, spec: GroupSpec | None, rows: int) -> Stats:
        c = self.columns
        values = c["stat"][int(c["stat_start"][number]) : int(c["stat_start"][number + 1])].tolist()
        stats: Stats = dict(zip(stat_names(spec)[: len(values)], values, strict=True))
        for name in _COUNTS:
            if name in stats:
                stats[name] = int(stats[name])
        if spec is not None and stats:
            kind_of(spec).check_stats(spec, stats, rows, self.where)
        return stats


def _numbers(ids: Array) -> npt.NDArray[np.uint64]:
    """uint64 [m]: the first bytes of uint8 [m, 8 or 16], so that the order is that of the hex digits."""
    return _beginnings(ids).astype(np.uint64)


def _beginnings(ids: Array) -> Array:
    """The same big-endian, as a view."""
    return np.ascontiguousarray(ids).view(">u8")[:, 0]


def keys_of(ids: Array) -> tuple[npt.NDArray[np.uint64], Places]:
    """The columns `key` (ascending) and `key_place` for samples uint8 [N, 16]."""
    numbers = _numbers(ids)
    order = np.argsort(numbers, kind="stable")
    return numbers[order], order.astype(np.int64)


def check(columns: Columns, specs: Mapping[str, GroupSpec], where: str) -> Segment:
    """The segment of these columns; CorruptionError where a number or a name is none that was ever written.

    specs: the column groups of the manifest. All checks are of whole columns, no step is a loop over tasks.
    """

    def need(sound: object, what: str) -> None:
        if not sound:
            raise CorruptionError(f"{where}: {what}; the file is damaged or was made to harm")

    c = columns
    tasks, samples, records = (len(c[name]) for name in ("task", "sample", "record_group"))
    files, stats, documents = len(c["file_size"]), len(c["stat"]), len(c["document"])
    need(tasks and len(c["length"]) == samples, "no tasks, or not one length per sample")
    need(len(c["record_digest"]) == len(c["record_bundle"]) == records, "columns of records differ in length")
    need(len(c["file_hash"]) == files, "columns of files differ in length")
    for name, count, total, least in (
        ("sample", tasks, samples, 1),
        ("record", tasks, records, 1),
        ("document", samples, documents, 0),
        ("file", records, files, 1),
        ("stat", records, stats, 0),
    ):
        start = c[f"{name}_start"]
        need(len(start) == count + 1 and start[0] == 0 and start[-1] == total, f"{name}_start does not fit")
        # From 0 to the total without a step down, so within them; differences could overflow.
        ascends = start[1:] > start[:-1] if least else start[1:] >= start[:-1]
        need(ascends.all(), f"{name}_start descends")
    length = c["length"]
    need(length.min() >= 1 and length.max() <= MAX_TOKENS, "a length that no sample has")
    for first in range(0, tasks, _TASKS_AT_ONCE):
        start = c["sample_start"][first : first + _TASKS_AT_ONCE + 1]
        rows = np.add.reduceat(length[start[0] : start[-1]], start[:-1] - start[0], dtype=np.int64)
        need((rows <= MAX_TOKENS).all(), "a task with more rows than any has")
    need(c["file_size"].min() >= 1 and c["file_size"].max() <= MAX_BYTES, "a size that no file has")
    need((np.abs(c["stat"]) <= MAX_STAT).all(), "a stat that is no number")
    segment = Segment(columns, where)
    pattern = group_ids()
    need(len(set(segment.groups)) == len(segment.groups), "a group twice")
    need(
        all(g == SAMPLES or (pattern.fullmatch(g) and g in specs) for g in segment.groups), "an unknown group"
    )
    _check_records(segment, specs, need)
    place = c["key_place"]
    need(len(c["key"]) == len(place) == samples, "keys of other samples")
    need(place.min() >= 0 and place.max() < samples, "a key outside of the samples")
    need((c["key"][1:] >= c["key"][:-1]).all(), "keys descend")
    met, beginnings = np.zeros(samples, bool), _beginnings(c["sample"])
    for first in range(0, samples, _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        met[place[some]] = True
        same = c["key"][some] == beginnings[place[some]]
        need(same.all(), "keys that are not those of the samples")
    need(met.all(), "a key twice")
    dropped = segment.dropped
    need((np.diff(dropped) > 0).all() and (not len(dropped) or dropped[0] >= 0), "dropped samples descend")
    need(not len(dropped) or dropped[-1] < samples, "a dropped sample that there is not")
    need(_distinct(_numbers(c["task"])), "a task twice")
    return segment


def _distinct(values: Array) -> bool:
    """Whether none is there twice. np.unique, which would tell as well, makes a table of all in memory."""
    ascending = np.sort(values)
    return bool((ascending[1:] != ascending[:-1]).all())


def _check_records(
    segment: Segment, specs: Mapping[str, GroupSpec], need: Callable[[object, str], None]
) -> None:
    """Each record has the files and the stats of its group, and each task its samples and no group twice."""
    c, count = segment.columns, len(segment.groups)
    group = c["record_group"].astype(np.int64)
    need(((group >= 0) & (group < count)).all(), "a record of no group")
    of = [None if name == SAMPLES else specs[name] for name in segment.groups]
    files = np.array([len(files_of(s, g)) for s, g in zip(of, segment.groups, strict=True)])
    stats = np.array([len(stat_names(spec)) for spec in of])
    least = np.array([kind_of(spec).least_stats(spec) if spec else 0 for spec in of])
    given = np.diff(c["stat_start"])
    need((np.diff(c["file_start"]) == files[group]).all(), "other files than the group has")
    sound = (given == stats[group]) | (given == least[group])
    need(sound.all(), "other stats than the group has")
    row = np.repeat(np.arange(segment.tasks), np.diff(c["record_start"]))
    need(_distinct(row * count + group), "a group of a task twice")
    has = np.zeros(segment.tasks, bool)
    if SAMPLES in segment.groups:
        has[row[group == segment.groups.index(SAMPLES)]] = True
    need(has.all(), "a task without its samples")
