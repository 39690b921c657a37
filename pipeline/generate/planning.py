"""What a store lacks of a request, portion by portion, and in which order it is captured."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from featurestore.catalogue.inventory import Inventory
from featurestore.format.plan import GenerationPlan, Task, Work, plan_generation
from featurestore.format.schema import GroupSpec, Sample, group_id
from featurestore.identity import SAMPLES
from featurestore.store import FeatureStore
from pipeline.generate.claims import Claims

# A shard is taken first when it is so many times smaller than the largest.
_EARLY = 2
# So many tasks are known to have been taken when another portion touches them, too.
_TASKS_TAKEN = 2**16

# Shards that wait, in memory, for another command to commit them.
_SHARDS_LATER = 256

# A shard to capture, with its samples in order.
Shard = tuple[Work, Sequence[Sample]]


@dataclass(frozen=True)
class PlannedPortion:
    """What a store lacks of a portion, and its samples by id; they may lack where the store has them."""

    plan: GenerationPlan
    samples: Mapping[str, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Column groups that are captured together. `kept` of `total` positions of the request are there before.

    While its end is not known, kept is of its first portion, and total about right, or None where nobody
    knows.
    """

    groups: tuple[GroupSpec, ...]
    kept: int
    total: int | None


class Planner:
    """Plans the portions of a request against the store as it is then; None where there is none yet.

    New shards have `shard_tokens` positions at most.
    """

    def __init__(self, store: FeatureStore | None, groups: Sequence[GroupSpec], shard_tokens: int) -> None:
        self._store, self._groups, self._shard_tokens = store, groups, shard_tokens

    def plan(self, wanted: Sequence[tuple[str, int]], first_tokens: int | None = None) -> GenerationPlan:
        """What the store lacks of these samples, (id, length) each.

        A shard that was planned before is completed where it is committed or where `wanted` has all of its
        samples; the samples of any other are planned anew. first_tokens: positions of the first new shard.
        """
        store, ids = self._store, {name for name, _ in wanted}
        touched = {task.id: task for task in self._planned_before(ids)}
        stored = {task.id for task in touched.values() if store and store.holds(task, ())}
        known = {
            name: task
            for name, task in touched.items()
            if name in stored or all(sample in ids for sample in task.sample_ids)
        }
        committed = {group: self._having(spec, known.values()) for group, spec in self._specs.items()}
        plan = plan_generation(
            known_tasks=known,
            committed={SAMPLES: stored, **committed},
            committed_specs=self._specs,
            wanted=wanted,
            groups=self._groups,
            shard_tokens=self._shard_tokens,
            first_tokens=first_tokens,
        )
        # What is added to a group of the store is a group of its own, which a shard has from now on.
        self._specs.update({group_id(spec): spec for work in plan.work for spec in work.groups})
        return plan

    def covers(self, wanted: Sequence[tuple[str, int]]) -> bool:
        """Whether the store lacks nothing of these samples."""
        return self._store is not None and self.plan(wanted).nothing_to_do

    def _having(self, spec: GroupSpec, tasks: Iterable[Task]) -> set[str]:
        return {task.id for task in tasks if self._store and self._store.holds(task, (spec,))}

    @cached_property
    def _specs(self) -> dict[str, GroupSpec]:
        """Every column group that a shard may have."""
        wanted = {group_id(spec): spec for spec in self._groups}
        return wanted | (self._before.specs if self._before else {})

    @cached_property
    def _before(self) -> Inventory | None:
        """The store as it was before this command."""
        return self._store.inventory() if self._store else None

    def _planned_before(self, ids: set[str]) -> Iterable[Task]:
        """For each of these samples the first shard that was planned with it before this command."""
        found: dict[str, Task] = {}
        for task in self._before.holding(ids).values() if self._before else ():
            for name in ids.intersection(task.sample_ids):
                found.setdefault(name, task)
        return found.values()


class Passes:
    """Gives out the shards of a request: in each pass those that lack the same column groups.

    One engine captures the groups of a pass. Usually all shards lack the same; a store that was extended may
    need several passes, and each reads the data set once more. Shards that another command has claimed come
    in a pass behind, so that this one's are all committed by then.

    Args:
        portions: reads the request's portions from the first on, whenever it is called.
        ordered: the order in which the shards of a portion are taken.
        progress: of a pass for these column groups (`kept` and `total` of `Pass`).
    """

    def __init__(
        self,
        store: FeatureStore,
        portions: Callable[[], Iterator[PlannedPortion]],
        ordered: Callable[[Sequence[Work]], list[Work]],
        progress: Callable[[tuple[GroupSpec, ...]], tuple[int, int | None]],
    ) -> None:
        self._store, self._portions, self._ordered, self._progress = store, portions, ordered, progress
        self._passes: list[tuple[GroupSpec, ...]] = []
        self._shards: Iterator[Shard] = iter(())
        self._first: Shard | None = None
        self._others, self._taken = True, OrderedDict[str, None]()
        self._claims, self._later = Claims(store), deque[Shard]()

    def begin(self, number: int) -> Pass | None:
        """A pass, 0 for the first; None where there is none left.

        A pass begins when it is first asked for, and ends the ones before.
        """
        if number == len(self._passes):
            late = sum(work.task.rows for work, _ in self._later)
            if late:
                self._passes.append(self._passes[-1])
                self._shards = self._awaited()
                kept, total = self._progress(self._passes[-1])
                return Pass(self._passes[-1], kept if total is None else total - late, total)
            if self._others:
                self._others, self._taken = False, OrderedDict()
                self._shards = self._claimed(self._lacking())
                self._first = next(self._shards, None)
        if number >= len(self._passes):
            self._claims.release()
            return None
        return Pass(self._passes[number], *self._progress(self._passes[number]))

    def take(self, number: int) -> Shard | None:
        """The next shard of a pass, None where there is none left."""
        if number != len(self._passes) - 1:
            return None
        shard, self._first = self._first, None
        return shard or next(self._shards, None)

    def _claimed(self, shards: Iterator[Shard]) -> Iterator[Shard]:
        """The same shards; those that another command is at are left for a pass of their own."""
        for shard in shards:
            if self._claims.take(shard[0]):
                yield shard
            else:
                self._later.append(shard)
            if len(self._later) > _SHARDS_LATER:
                self._later = deque(one for one in self._later if not self._done(one[0]))
            if len(self._later) > _SHARDS_LATER:
                yield self._later.popleft()

    def _done(self, work: Work) -> bool:
        return self._store.holds(work.task, work.groups)

    def _awaited(self) -> Iterator[Shard]:
        """What was left, once it is committed or its claim has become old."""
        self._later = deque(random.SystemRandom().sample(self._later, len(self._later)))
        while self._later:
            shard = self._later.popleft()
            self._claims.wait(shard[0])
            yield shard

    def _lacking(self) -> Iterator[Shard]:
        """The shards of a pass; what they lack is settled by the first."""
        before, groups = set(self._passes), None
        for portion in self._portions():
            untaken = [work for work in portion.plan.work if work.groups not in before]
            if groups is None and untaken:
                groups = min((work.groups for work in untaken), key=repr)
                self._passes.append(groups)
            mine = [work for work in untaken if work.groups == groups]
            self._others = self._others or len(mine) < len(untaken)
            for work in self._ordered(mine) if mine else []:
                if work.task.id not in self._taken:
                    self._taken[work.task.id] = None
                    if len(self._taken) > _TASKS_TAKEN:
                        self._taken.popitem(last=False)
                    yield work, self._samples_of(portion, work.task)

    def _samples_of(self, portion: PlannedPortion, task: Task) -> Sequence[Sample]:
        if all(name in portion.samples for name in task.sample_ids):
            return [portion.samples[name] for name in task.sample_ids]
        # A task of an earlier request that this one overlaps: its tokens are in the store.
        return self._store.read_samples(task.id)


def shuffled(works: Sequence[Work]) -> list[Work]:
    """Several commands may be at work on the same tasks. Each takes them in an order of its own and leaves
    out what another has committed meanwhile, so they share the work and meet at its end only. A shard that
    was planned small, to be committed early, comes first.
    """
    return small_first(random.SystemRandom().sample(works, len(works)))


def small_first(works: Sequence[Work]) -> list[Work]:
    """In this order, but a shard that was planned small first."""
    largest = max(work.task.rows for work in works)
    return sorted(works, key=lambda work: work.task.rows * _EARLY > largest)
