"""The objective: a weighted sum of named terms, each saying which cached features it needs.

Head terms see the student's logits through `student.losses.sparse`; hidden terms compare one layer of the
student with one cached layer of the teacher. A new loss is a function in `student.losses` and one entry in a
table here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from student.errors import UserError
from student.losses import hidden
from student.losses.fused import ReducedLoss
from student.losses.sparse import cross_entropy, forward_kl

HiddenLoss = Callable[[Tensor, Tensor], Tensor]

HEAD_LOSSES: Mapping[str, tuple[ReducedLoss, frozenset[str]]] = {
    "kl": (forward_kl, frozenset({"logits"})),
    "ce": (cross_entropy, frozenset()),
}
HIDDEN_LOSSES: Mapping[str, HiddenLoss] = {"mse": hidden.mse, "cosine": hidden.cosine}


@dataclass(frozen=True)
class HeadTerm:
    """A loss on the output distribution."""

    name: str
    weight: float

    @property
    def loss(self) -> ReducedLoss:
        return HEAD_LOSSES[self.name][0]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that the cache must hold."""
        return HEAD_LOSSES[self.name][1]


@dataclass(frozen=True)
class HiddenTerm:
    """A loss between hidden states: indices count as in transformers' `output_hidden_states` on both
    sides.
    """

    name: str
    weight: float
    teacher_layer: int
    student_layer: int

    @property
    def loss(self) -> HiddenLoss:
        return HIDDEN_LOSSES[self.name]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that the cache must hold."""
        return frozenset({f"hidden.L{self.teacher_layer}"})

    @property
    def label(self) -> str:
        """Name in logs, e.g. `mse_L10_to_L4`."""
        return f"{self.name}_L{self.teacher_layer}_to_L{self.student_layer}"


@dataclass(frozen=True)
class Objective:
    """loss = sum over positions and terms of weight * term / number of learned positions."""

    head: tuple[HeadTerm, ...]
    hidden: tuple[HiddenTerm, ...]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that training reads."""
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def terms(self) -> tuple[HeadTerm | HiddenTerm, ...]:
        """All terms in the order of `labels`."""
        return (*self.head, *self.hidden)

    @property
    def labels(self) -> list[str]:
        """Names of the terms in logs, head terms first."""
        return [term.name for term in self.head] + [term.label for term in self.hidden]

    @property
    def weights(self) -> list[float]:
        """Weights in the order of `labels`."""
        return [term.weight for term in self.terms]


def parse_layer_map(text: str) -> list[tuple[int, int]]:
    """`"10:4,20:8"` -> [(10, 4), (20, 8)], teacher index before student index."""
    try:
        pairs = [(int(teacher), int(own)) for teacher, own in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise UserError(
            f"--layer-map {text!r} is not a list of TEACHER:STUDENT pairs; write e.g. --layer-map 10:4,20:8"
        ) from None
    if len(set(pairs)) != len(pairs):
        raise UserError(f"--layer-map {text!r} names a pair twice; give each pair once")
    return pairs


def parse_layers(text: str) -> list[int]:
    """`"10,20"` -> [10, 20]."""
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--hidden-layers {text!r} is not a list of numbers; write e.g. --hidden-layers 10,20"
        ) from None
    if len(set(layers)) != len(layers):
        raise UserError(f"--hidden-layers {text!r} names a layer twice; give each layer once")
    return layers


def depth_map(layers: Sequence[int], teacher_depth: int, student_depth: int) -> list[tuple[int, int]]:
    """Pair each teacher index with the student index at the same relative depth, rounded half up."""
    return [(layer, (2 * layer * student_depth + teacher_depth) // (2 * teacher_depth)) for layer in layers]


def check_pairs(pairs: Sequence[tuple[int, int]], teacher_depth: int, student_depth: int, flag: str) -> None:
    """UserError unless every index is within 0..depth of its model."""
    for teacher_layer, student_layer in pairs:
        for side, layer, depth in (
            ("teacher", teacher_layer, teacher_depth),
            ("student", student_layer, student_depth),
        ):
            if not 0 <= layer <= depth:
                raise UserError(
                    f"{flag}: {side} index {layer} is out of range; the {side}'s hidden states are numbered "
                    f"0 (embeddings) to {depth} (after the last layer)"
                )
