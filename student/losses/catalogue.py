"""The catalogue of losses: one entry per loss, with what it computes, what it needs and how exact it is.

A new loss is a pure function beside its kin in `student.losses` and one entry in the table there; flags,
objective files, the table of `distily-train objectives`, docs/objectives.md and the tests follow from the
entry. `register_loss` adds one from outside the package.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cache
from typing import Any, Literal, get_args

from distily.plugins import load_plugins
from student.errors import UserError

Kind = Literal["head", "dense", "hidden", "structure", "relation"]
Exactness = Literal["exact", "unbiased", "bound", "coarse"]


class Need(Flag):
    """What a loss reads of a cache; members are joined by `|`.

    Attributes:
        NOTHING: labels only, which every cache has.
        HEAD: the stored head of each distribution and its logsumexp.
        DRAWS: tokens sampled from outside the head.
        LABEL: the teacher's log-probability of the label.
        FULL: the full distribution, by way of the final hidden state and the teacher's head.
        HIDDEN: hidden states.
        PROJECTIONS: hidden states, and the teacher's projections of them to queries, keys and values.

    Example:
        Need.HEAD | Need.DRAWS
    """

    NOTHING = 0
    HEAD = auto()
    DRAWS = auto()
    LABEL = auto()
    FULL = auto()
    HIDDEN = auto()
    PROJECTIONS = auto()

    @property
    def letters(self) -> str:
        """The letters that tables show for the members."""
        return "".join(NEEDS[need][0] for need in self)


# Letter in the tables, and what is meant.
NEEDS = {
    Need.HEAD: ("H", "head and logsumexp"),
    Need.DRAWS: ("T", "sampled tail"),
    Need.LABEL: ("Y", "log-probability of the label"),
    Need.FULL: ("F", "full distribution: final hidden state and the teacher's head"),
    Need.HIDDEN: ("R", "hidden states"),
    Need.PROJECTIONS: ("A", "hidden states and the teacher's projections"),
}
DISTRIBUTION = Need.HEAD | Need.DRAWS | Need.LABEL
EXACTNESS = {
    "exact": "the loss itself",
    "unbiased": "an unbiased estimate",
    "bound": "a lower bound",
    "coarse": "the loss of the head and one bucket for the rest; no bound",
}


@dataclass(frozen=True)
class Option:
    """A number or a word that a loss takes beside its weight.

    Args:
        default: the value where none is given. None: it follows from the cache and the student.
        help: what it does, for tables and messages.
        low: the smallest value allowed.
        high: the largest value allowed.
        open: whether `low` and `high` themselves are excluded.
        choices: the words allowed, in the place of a range.
        integer: whether only whole numbers are allowed.

    Example:
        LossOption(0.5, "share of the teacher in the mixture", low=0.0, high=1.0, open=True)
    """

    default: float | int | str | None
    help: str
    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    choices: tuple[str, ...] = ()
    integer: bool = False

    def check(self, value: Any, where: str) -> Any:
        """The value, a float for any number unless `integer`; UserError otherwise."""
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{where} must be one of {', '.join(self.choices)}, not {value!r}")
            return value
        if value is None and self.default is None:
            return None
        kinds = (int,) if self.integer else (int, float)
        inside = type(value) in kinds and math.isfinite(value) and self.low <= value <= self.high
        if not inside or (self.open and value in (self.low, self.high)):
            raise UserError(f"{where} must be {self.domain()}, not {value!r}")
        return value if self.integer else float(value)

    def domain(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return ", ".join(self.choices)
        kind = "a whole number" if self.integer else "a number"
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.low == -math.inf and self.high == math.inf:
            return kind
        if self.high == math.inf:
            return f"{kind} {'above' if self.open else 'of at least'} {low}"
        return f"{kind} {'between' if self.open else 'from'} {low} {'and' if self.open else 'to'} {high}"


@dataclass(frozen=True)
class Paper:
    """Where a loss comes from; arxiv: its number there, None where it is not."""

    title: str
    arxiv: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One entry of the catalogue. What `function` takes and returns depends on `kind`:

    - head: `(ReducedLogits, SparseTargets, **options) -> [N]`. It runs inside the fused LM head and sees
      nothing of the student but what `ReducedLogits` holds.
    - dense: `(Rows, **options) -> (values [n], gradient [n, V])`, with respect to the student's logits; see
      `student.losses.full`.
    - hidden: `(student [N, D], teacher [N, D], **options) -> [N]`, called for each pair of layers.
    - structure: `(student, teacher, lengths, **options) -> [N]`, where `lengths` says how many of the N rows
      belong to each sequence. Student and teacher are `[N, D]` of a pair of layers, or with `flow` two such
      tensors each, of a pair and of the next deeper one.
    - relation: `(BlockPair, **options) -> [B, T]`, called for each pair of blocks.

    Shape letters: N learned positions, D hidden size, V vocabulary, B batch, T positions.

    Args:
        name: unique; flags and objective files use it.
        kind: one of the five above.
        function: what computes the loss, see above.
        needs: what the cache must hold.
        formula: as tables and the documentation show it.
        paper: where the loss comes from.
        exactness: "exact" (the loss itself), "unbiased" (an unbiased estimate), "bound" (a lower bound) or
            "coarse" (the loss of the head and one bucket for the rest, which is no bound).
        statement: in what sense it is exact, or why it is not, in a sentence.
        better: what makes it more exact where the cache holds it.
        options: its further arguments, by name.
        tails: for head: temperatures at which it needs the student's tail, beside 1 and the option
            `temperature`.
        ranked: for head: whether it needs the student's own largest logits.
        any_width: for structure: whether student and teacher may differ in width without a projector.
        flow: for structure: whether it takes a pair of layers together with the next deeper one.
        mixes: for head: whether value and gradient, at temperature 1, are linear in the teacher's
            probabilities but for constants, so that a mixture of several sparse teachers serves it.
        spans: for head: whether it compares likelihoods of spans of text, which are several tokens where the
            student's tokenizer is not the teacher's.

    Example:
        Loss(name="brier", kind="head", function=brier, needs=Need.HEAD, exactness="bound")
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    needs: Need
    formula: str = ""
    paper: Paper | None = None
    exactness: Exactness = "exact"
    statement: str = ""
    better: Need = Need.NOTHING
    options: Mapping[str, Option] = field(default_factory=dict)
    tails: tuple[float, ...] = ()
    ranked: bool = False
    any_width: bool = False
    flow: bool = False
    mixes: bool = False
    spans: bool = False

    def check_options(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """All options, given or default; UserError for an unknown name or a bad value."""
        for name in given:
            if name not in self.options:
                known = f"{self.name} takes {', '.join(self.options) or 'no options'}"
                raise UserError(f"{where}: unknown key {name!r}{suggest(name, self.options)}; {known}")
        return {
            name: option.check(given.get(name, option.default), f"{where}: {name}")
            for name, option in self.options.items()
        }


_registered: dict[str, Loss] = {}


def register_loss(loss: Loss) -> Loss:
    """Make a loss known by its name, to `DistillationConfig`, objective files and flags of this process.

    A plugin (`distily.plugins`) that calls it makes the loss known to the command line.

    Args:
        loss: its entry. `--hidden-loss NAME` finds a loss between hidden states that is named `hidden_NAME`.

    Returns:
        The entry.

    Raises:
        ValueError: there is a loss of that name, or its kind or needs are none that there are.

    Example:
        register_loss(Loss(name="hidden_mine", kind="hidden", function=mine, needs=Need.HIDDEN))
    """
    if loss.name in _ours() or loss.name in _registered:
        raise ValueError(f"a loss named {loss.name!r} exists already")
    if loss.kind not in get_args(Kind):
        raise ValueError(f"{loss.name}: kind {loss.kind!r} is none of {', '.join(get_args(Kind))}")
    if not isinstance(loss.needs, Need):
        raise ValueError(
            f"{loss.name}: needs {loss.needs!r}; give members of Need, e.g. Need.HEAD | Need.DRAWS"
        )
    _registered[loss.name] = loss
    return loss


def catalogue() -> Mapping[str, Loss]:
    """Every loss by name, in the order of the tables; registered ones at the end.

    Raises:
        PluginError: a plugin of the environment fails.
    """
    load_plugins()
    return {**_ours(), **_registered}


@cache
def _ours() -> Mapping[str, Loss]:
    from student.losses.full_entries import DENSE_LOSSES
    from student.losses.hidden import HIDDEN_LOSSES
    from student.losses.relation_terms import RELATION_LOSSES
    from student.losses.sparse_entries import HEAD_LOSSES
    from student.losses.structure import STRUCTURE_LOSSES

    entries = (*HEAD_LOSSES, *DENSE_LOSSES, *HIDDEN_LOSSES, *STRUCTURE_LOSSES, *RELATION_LOSSES)
    by_name = {entry.name: entry for entry in entries}
    assert len(by_name) == len(entries), "two losses of one name"
    return by_name


def find_loss(name: object, where: str) -> Loss:
    """UserError, with the name that comes closest, for an unknown loss."""
    losses = catalogue()
    if not isinstance(name, str) or name not in losses:
        hint = suggest(str(name), losses) or "; `distily-train objectives` lists them"
        raise UserError(f"{where}: unknown loss {name!r}{hint}")
    return losses[name]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean WORD?` where something comes close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
