"""What a generate command has to compute. Pure functions: no files, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from featurestore.errors import StoreFormatError
from featurestore.format.kinds.table import covers, rest
from featurestore.format.schema import MAX_TOKENS, GroupSpec
from featurestore.identity import SAMPLE_ID, SAMPLES, canonical_json, check_id, check_int, digest


@dataclass(frozen=True)
class Task:
    """Samples that are computed, committed and read together: one shard."""

    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sample_ids or len(self.sample_ids) != len(self.lengths):
            raise StoreFormatError("a task needs at least one sample and one length per sample")
        if len(set(self.sample_ids)) != len(self.sample_ids):
            raise StoreFormatError("a task names a sample twice")
        for sample_id, length in zip(self.sample_ids, self.lengths, strict=True):
            check_id(sample_id, SAMPLE_ID, "task")
            check_int(length, 1, MAX_TOKENS, f"length of sample {sample_id}")
        check_int(self.rows, 1, MAX_TOKENS, "rows of a task")

    @cached_property
    def id(self) -> str:
        """16 hex digits: a hash of the sample ids and lengths."""
        return digest(canonical_json([list(self.sample_ids), list(self.lengths)]), 16)

    @property
    def rows(self) -> int:
        """Positions of all samples together."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Work:
    """What one task still needs. `needs_samples`: its tokens and masks are not committed either."""

    task: Task
    groups: tuple[GroupSpec, ...]
    needs_samples: bool


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """The difference between a request and a store.

    new_tasks: tasks that no plan file has yet. work: what is left to compute, known tasks first.
    tasks_total, rows_total: of every task that the request touches. samples_total: distinct wanted
    samples; duplicates: how many more were asked for.
    """

    new_tasks: tuple[Task, ...]
    work: tuple[Work, ...]
    tasks_total: int
    rows_total: int
    samples_total: int
    duplicates: int

    @property
    def rows_to_do(self) -> int:
        """Positions of the tasks that still need work."""
        return sum(work.task.rows for work in self.work)

    @property
    def nothing_to_do(self) -> bool:
        """The store already serves the whole request."""
        return not self.work


def split_tasks(
    ids_and_lengths: Iterable[tuple[str, int]], shard_tokens: int, first_tokens: int | None = None
) -> list[Task]:
    """Cut samples, in order, into tasks of at most `shard_tokens` rows; a longer sample is a task alone.

    first_tokens: the same limit for the first task, where it is lower.
    """
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ValueError(f"shard_tokens must be in [1, {MAX_TOKENS}], not {shard_tokens}")
    tasks: list[Task] = []
    pending: list[tuple[str, int]] = []
    rows, limit = 0, min(shard_tokens, first_tokens or shard_tokens)
    for sample_id, length in ids_and_lengths:
        if pending and rows + length > limit:
            tasks.append(_task(pending))
            pending, rows, limit = [], 0, shard_tokens
        pending.append((sample_id, length))
        rows += length
    if pending:
        tasks.append(_task(pending))
    return tasks


def plan_generation(
    known_tasks: Mapping[str, Task],
    committed: Mapping[str, AbstractSet[str]],
    committed_specs: Mapping[str, GroupSpec],
    wanted: Sequence[tuple[str, int]],
    groups: Sequence[GroupSpec],
    shard_tokens: int,
    first_tokens: int | None = None,
) -> GenerationPlan:
    """Subtract what is committed from (wanted samples x groups).

    `committed` maps a group id ("samples" included) to the ids of tasks that have it, `committed_specs`
    a group id to its spec. A sample that a known task holds stays there, and such a task is completed
    whole; only unknown samples form new tasks. A group that committed ones cover is no work, and of a
    share of the positions the part that they lack.
    """
    distinct = dict(wanted)
    task_of: dict[str, Task] = {}
    for task in known_tasks.values():
        for sample_id in task.sample_ids:
            task_of.setdefault(sample_id, task)
    touched = {task_of[s].id: task_of[s] for s in distinct if s in task_of}
    unknown = ((s, n) for s, n in distinct.items() if s not in task_of)
    new_tasks = split_tasks(unknown, shard_tokens, first_tokens)
    tasks = [*touched.values(), *new_tasks]
    needed = _widest(groups)
    work = [w for task in tasks if (w := _work(task, committed, committed_specs, needed)) is not None]
    return GenerationPlan(
        new_tasks=tuple(new_tasks),
        work=tuple(work),
        tasks_total=len(tasks),
        rows_total=sum(task.rows for task in tasks),
        samples_total=len(distinct),
        duplicates=len(wanted) - len(distinct),
    )


def _task(samples: list[tuple[str, int]]) -> Task:
    ids, lengths = zip(*samples, strict=True)
    return Task(sample_ids=ids, lengths=lengths)


def _widest(groups: Sequence[GroupSpec]) -> list[GroupSpec]:
    """The distinct groups of a request that no other group of it covers."""
    distinct = list(dict.fromkeys(groups))
    return [g for g in distinct if not any(other != g and covers(other, g) for other in distinct)]


def _work(
    task: Task,
    committed: Mapping[str, AbstractSet[str]],
    specs: Mapping[str, GroupSpec],
    needed: Sequence[GroupSpec],
) -> Work | None:
    have = [specs[g] for g, tasks in committed.items() if g in specs and task.id in tasks]
    missing = tuple(lacking for want in needed if (lacking := rest(have, want)) is not None)
    needs_samples = task.id not in committed.get(SAMPLES, ())
    return Work(task, missing, needs_samples) if missing or needs_samples else None
