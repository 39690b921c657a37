"""The objective of a run: a weighted sum of terms, each one loss of the catalogue with its options."""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from student.losses.blocks import BlockPair
from student.losses.catalogue import DISTRIBUTION, Loss, Need, catalogue
from student.losses.sparse import Reduction
from student.objective.projectors import ProjectorSpec
from student.objective.weights import Weight

# Kinds of losses that are computed from states or blocks, outside any LM head.
OUTSIDE_HEADS = ("hidden", "structure", "relation")


@dataclass(frozen=True, kw_only=True)
class View:
    """What terms outside the fused head see of a batch.

    student: layer -> hidden states [N, D] at the learned positions, numbered like transformers'
    `output_hidden_states`. teacher: (number of a cache, layer) -> those of its teacher. blocks: (number of a
    cache, (teacher, student) block) -> both on the whole padded batch. fisher: number of a cache -> Fisher
    information of its teacher's final states, [N, D]. sequence_N, position_N: int64 [N], which sample
    of the batch each of them belongs to, rising, and where in it. project: (name of a projector, states
    [N, D]) -> states as wide as the teacher's. weight: (number of a cache, layer) -> what the loss of each
    position counts, float32 [N], where the cache has a share of the teacher's states: its inverse where it
    has one, and 0 elsewhere; None for a layer that it has at all positions.
    """

    student: Callable[[int], Tensor]
    teacher: Callable[[int, int], Tensor]
    blocks: Callable[[int, tuple[int, int]], BlockPair]
    fisher: Callable[[int], Tensor]
    sequence_N: Tensor
    position_N: Tensor
    project: Callable[[str, Tensor], Tensor]
    weight: Callable[[int, int], Tensor | None]

    def lengths(self) -> list[int]:
        """How many learned positions the samples have, without those that have none."""
        lengths: list[int] = torch.unique_consecutive(self.sequence_N, return_counts=True)[1].tolist()
        return lengths


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand. label: its name in logs; pair: (teacher layer, student layer) of a hidden term, or blocks
    of a relation, numbered as the hidden states that go into them; (last, last) of a dense term; following
    the next deeper pair of one between layers; projector: what brings the student's states to the teacher's
    width, None where they are taken as they are; teachers: numbers of the caches that it learns from, several
    for their mixture, none for a loss on labels; shared: from a teacher with another tokenizer it learns the
    tokens that both have.
    """

    loss: Loss
    weight: Weight
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[int, int] | None = None
    following: tuple[int, int] | None = None
    projector: ProjectorSpec | None = None
    teachers: tuple[int, ...] = (0,)
    shared: bool = False

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs of layers that the term compares."""
        return tuple(pair for pair in (self.pair, self.following) if pair is not None)

    @property
    def projectors(self) -> dict[str, ProjectorSpec]:
        """A projector for each of `pairs`, by name."""
        if self.projector is None:
            return {}
        return {f"{self.label}_from_L{own}": self.projector for _, own in self.pairs}

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that each of `teachers` must hold."""
        kinds = {"logits"} if self.loss.needs & DISTRIBUTION else set()
        if self.temperature != 1.0 and self.loss.kind == "head":
            kinds.add(f"lse.T{self.temperature:g}")
        return frozenset(kinds | {f"hidden.L{layer}" for layer, _ in self.pairs})

    @property
    def temperature(self) -> float:
        """Of both distributions; 1 for a loss without that option."""
        return float(self.options.get("temperature", 1.0))

    @property
    def function(self) -> Callable[..., Any]:
        """The loss with its options filled in."""
        return partial(self.loss.function, **self.options) if self.options else self.loss.function

    @property
    def student_layers(self) -> frozenset[int]:
        """Hidden states of the student that the term reads."""
        return frozenset(layer for _, layer in self.pairs)

    def values(self, view: View) -> Tensor:
        """The unweighted loss of every learned position, [N]; for terms outside the fused head."""
        assert self.pair is not None
        function: Callable[..., Tensor] = self.function
        if self.loss.kind == "relation":
            return function(view.blocks(self.teachers[0], self.pair))[view.sequence_N, view.position_N]
        weights = [view.weight(self.teachers[0], layer) for layer, _ in self.pairs]
        teacher = tuple(view.teacher(self.teachers[0], layer) for layer, _ in self.pairs)
        student = tuple(view.student(layer) for _, layer in self.pairs)
        if self.projector is not None:
            student = tuple(map(view.project, self.projectors, student))
        if self.loss.kind == "structure":
            assert weights.count(None) == len(weights), "relations of positions need all of them"
            sides = (student, teacher) if self.loss.flow else (student[0], teacher[0])
            return function(*sides, view.lengths())
        if Need.FULL in self.loss.needs:
            return function(student[0], teacher[0], view.fisher(self.teachers[0]))
        value_N = function(student[0], teacher[0])
        return value_N if weights[0] is None else value_N * weights[0]


def term(
    name: str,
    weight: float | Weight = 1.0,
    pair: tuple[int, int] | None = None,
    following: tuple[int, int] | None = None,
    projector: ProjectorSpec | None = None,
    **options: Any,
) -> Term:
    """A term of the catalogue; options that are not given have their defaults."""
    loss = catalogue()[name]
    fixed = weight if isinstance(weight, Weight) else Weight.constant(weight)
    label = name if pair is None or loss.kind == "dense" else f"{name}_L{pair[0]}_to_L{pair[1]}"
    return Term(
        loss=loss,
        weight=fixed,
        label=label,
        options=loss.check_options(options, name),
        pair=pair,
        following=following,
        projector=projector,
    )


def reduction(terms: Iterable[Term]) -> Reduction:
    """What head terms want of the student."""
    wanted = tuple(terms)
    tails = {t for term in wanted for t in (term.temperature, *term.loss.tails)} - {1.0}
    return Reduction(tuple(sorted(tails)), any(term.loss.ranked for term in wanted))


@dataclass(frozen=True)
class Objective:
    """loss = sum over positions and terms of weight * term / number of learned positions.

    balanced: weights are ratios of gradient norms, see `student.training.balance`. teachers: the weights of
    the caches' teachers in a mixture, as far as they stand to each other. measured: the caches whose
    teachers, mixed, held-out metrics compare with; measures_shared: of a teacher with another tokenizer, on
    the tokens that both have.
    """

    terms: tuple[Term, ...]
    balanced: bool = False
    teachers: tuple[Weight, ...] = (Weight.constant(1.0),)
    measured: tuple[int, ...] = (0,)
    measures_shared: bool = False

    @classmethod
    def of(cls, terms: Sequence[Term], balanced: bool = False) -> Objective:
        """Head terms first, then dense ones; a label that occurs again gets a number."""
        order = {"head": 0, "dense": 1}
        ordered = sorted(terms, key=lambda term: order.get(term.loss.kind, 2))
        seen: dict[str, int] = {}
        named = []
        for one in ordered:
            seen[one.label] = count = seen.get(one.label, 0) + 1
            label = one.label if count == 1 else f"{one.label}_{count}"
            named.append(replace(one, label=label))
        return cls(tuple(named), balanced)

    @property
    def head(self) -> tuple[Term, ...]:
        """Terms that are computed inside the fused LM head."""
        return tuple(term for term in self.terms if term.loss.kind == "head")

    @property
    def dense(self) -> tuple[Term, ...]:
        """Terms that are computed from both LM heads over the whole vocabulary."""
        return tuple(term for term in self.terms if term.loss.kind == "dense")

    @property
    def others(self) -> tuple[Term, ...]:
        """All other terms."""
        return tuple(term for term in self.terms if term.loss.kind in OUTSIDE_HEADS)

    def of_teacher(self, store: int) -> tuple[Term, ...]:
        """Terms that learn from cache `store`."""
        return tuple(term for term in self.terms if store in term.teachers)

    def needs_head(self, store: int = 0) -> bool:
        """Whether a term needs the LM head of a cache's teacher."""
        return any(Need.FULL in term.loss.needs for term in self.of_teacher(store))

    def relations(self, store: int = 0) -> frozenset[tuple[int, int]]:
        """(teacher, student) blocks that are compared with a cache's teacher."""
        terms = (term for term in self.of_teacher(store) if term.loss.kind == "relation")
        return frozenset(term.pair for term in terms if term.pair is not None)

    def needs(self, store: int = 0) -> frozenset[str]:
        """Kinds of column groups that training reads of a cache."""
        return frozenset().union(*(term.needs for term in self.of_teacher(store)))

    @property
    def projectors(self) -> dict[str, ProjectorSpec]:
        """The projectors of all terms, by name."""
        return {name: spec for term in self.terms for name, spec in term.projectors.items()}

    @property
    def labels(self) -> list[str]:
        """Names of the terms in logs, head terms first."""
        return [term.label for term in self.terms]

    @property
    def weights_move(self) -> bool:
        """Whether the weights change in the course of the training."""
        return self.balanced or any(term.weight.schedule != "constant" for term in self.terms)

    @property
    def shares_move(self) -> bool:
        """Whether the mixture of several teachers changes in the course of the training."""
        return any(weight.schedule != "constant" for weight in self.teachers)

    def shares_at(self, progress: float) -> list[float]:
        """Shares of the caches' teachers in a mixture, 1 together, when `progress` (0 to 1) is done."""
        weights = [weight.at(progress) for weight in self.teachers]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def weighted(self, kinds: Collection[str], weights: Sequence[float]) -> list[tuple[Term, float]]:
        """The terms whose loss is of one of the kinds, each with its weight; weights: of all terms."""
        pairs = zip(self.terms, weights, strict=True)
        return [(term, weight) for term, weight in pairs if term.loss.kind in kinds]

    def weights_at(self, progress: float) -> list[float]:
        """Weights in the order of `labels` when `progress` (0 to 1) of the training is done."""
        return [term.weight.at(progress) for term in self.terms]
