"""The objective of a run: a weighted sum of terms, each one loss of the catalogue with its options."""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from student.objective.catalogue import Loss, catalogue
from student.objective.weights import Weight

Balance = Literal["none", "gradient_norm"]


@dataclass(frozen=True)
class View:
    """What terms outside the fused head see of a batch.

    student, teacher: layer -> hidden states [N, D] at the learned positions, both numbered like transformers'
    `output_hidden_states`. sequence_N, position_N: int64 [N], where each of them stands in the batch.
    """

    student: Callable[[int], Tensor]
    teacher: Callable[[int], Tensor]
    sequence_N: Tensor
    position_N: Tensor


@dataclass(frozen=True)
class Term:
    """One summand. label: its name in logs; pair: (teacher layer, student layer) of a hidden term."""

    loss: Loss
    weight: Weight
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[int, int] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that the cache must hold."""
        kinds = {"logits"} if set(self.loss.needs) & set("HTY") else set()
        if self.temperature != 1.0:
            kinds.add(f"lse.T{self.temperature:g}")
        if self.pair is not None:
            kinds.add(f"hidden.L{self.pair[0]}")
        return frozenset(kinds)

    @property
    def temperature(self) -> float:
        """Of both distributions; 1 for a loss without that option."""
        return float(self.options.get("temperature", 1.0))

    @property
    def function(self) -> Callable[..., Tensor]:
        """The loss with its options filled in."""
        return partial(self.loss.function, **self.options) if self.options else self.loss.function

    @property
    def student_layers(self) -> frozenset[int]:
        """Hidden states of the student that the term reads."""
        return frozenset() if self.pair is None else frozenset({self.pair[1]})

    def values(self, view: View) -> Tensor:
        """The unweighted loss of every learned position, [N]; for terms outside the fused head."""
        if self.loss.kind == "hidden":
            assert self.pair is not None
            return self.function(view.student(self.pair[1]), view.teacher(self.pair[0]))
        return self.loss.function(view, self)


def term(
    name: str, weight: float | Weight = 1.0, pair: tuple[int, int] | None = None, **options: Any
) -> Term:
    """A term of the catalogue; options that are not given have their defaults."""
    loss = catalogue()[name]
    fixed = weight if isinstance(weight, Weight) else Weight.constant(weight)
    label = name if pair is None else f"{name}_L{pair[0]}_to_L{pair[1]}"
    return Term(loss, fixed, label, loss.check_options(options, name), pair)


@dataclass(frozen=True)
class Objective:
    """loss = sum over positions and terms of weight * term / number of learned positions.

    balance "gradient_norm": weights are ratios of gradient norms, see `student.objective.balance`.
    """

    terms: tuple[Term, ...]
    balance: Balance = "none"

    @classmethod
    def of(cls, terms: Sequence[Term], balance: Balance = "none") -> Objective:
        """Head terms first; a label that occurs again gets a number."""
        ordered = sorted(terms, key=lambda term: term.loss.kind != "head")
        seen: dict[str, int] = {}
        named = []
        for one in ordered:
            seen[one.label] = count = seen.get(one.label, 0) + 1
            label = one.label if count == 1 else f"{one.label}_{count}"
            named.append(Term(one.loss, one.weight, label, one.options, one.pair))
        return cls(tuple(named), balance)

    @property
    def head(self) -> tuple[Term, ...]:
        """Terms that are computed inside the fused LM head."""
        return tuple(term for term in self.terms if term.loss.kind == "head")

    @property
    def others(self) -> tuple[Term, ...]:
        """All other terms."""
        return self.terms[len(self.head) :]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of column groups that training reads."""
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def labels(self) -> list[str]:
        """Names of the terms in logs, head terms first."""
        return [term.label for term in self.terms]

    def weights_at(self, progress: float) -> list[float]:
        """Weights in the order of `labels` when `progress` (0 to 1) of the training is done."""
        return [term.weight.at(progress) for term in self.terms]
