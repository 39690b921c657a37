"""What a cache knows of a position before it is learned, and which positions are learned for it.

A measure is a number of each position t, in nats, about the prediction of token t + 1:

    entropy       of the teacher's whole distribution
    surprise      -log p(token t + 1) of the teacher
    disagreement  of several teachers: the largest surprise less the smallest, |s_1 - s_2| of two
    random        no measure of anything, in [0, 1): `generate --hidden-positions` chooses by the same one

Entropy and surprise are those of the first cache's teacher. Measures are read from the stored codes, whose
steps are 1/64 nat; NaN where the cache does not know it. The random number follows from the sample's id and
the position, so a share of the positions is the same in every run and holds all smaller ones. "Not All
Tokens Are What You Need" (arXiv:2404.07965) selects positions by a measure.

T positions of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.codec import decode_entropy, decode_labels
from featurestore.format.codes import LogitsCodes
from featurestore.format.positions import position_draws
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CodedSample
from student.errors import UserError

Array = npt.NDArray[Any]
MEASURES = ("entropy", "surprise", "disagreement")
RANDOM = "random"
_CONDITION = re.compile(r"\s*([a-z]+)\s*([<>])\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*")


@dataclass(frozen=True, eq=False, kw_only=True)
class WeighedSample(CodedSample):
    """weight: float32 [T], in proportion to what the loss of each position counts; None: all alike."""

    weight: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """`measure < bound` or, with above, `measure > bound`.

    percent: as given, where the bound is a quantile of the training set: the smallest value that at least so
    many of the positions do not exceed. `<` then includes the bound, so that a position is on one side of it
    or the other, ties on the lower one. bound: nats; NaN while it is not known.
    """

    measure: str
    above: bool
    bound: float
    percent: float | None = None

    def holds(self, values_T: Array) -> Array:
        """bool [T]; False where the measure is not known."""
        if self.above:
            return np.asarray(values_T > self.bound)
        return np.asarray(values_T < self.bound if self.percent is None else values_T <= self.bound)

    def __str__(self) -> str:
        value = f"{self.bound:g}" if self.percent is None else f"{self.percent:g}%"
        return f"{self.measure}{'>' if self.above else '<'}{value}"


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Which positions are learned, and what each counts. specs: of each cache the distribution that a measure
    is read from, None of one that is not asked. said: what came of it, in a line.
    """

    conditions: tuple[Condition, ...] = ()
    weight: str | None = None
    specs: tuple[LogitsSpec | None, ...] = (None,)
    said: str = ""

    def record(self) -> dict[str, str]:
        """What was asked for, by flag, without those that were not given."""
        given = {"select": ",".join(map(str, self.conditions)), "weight": self.weight or ""}
        return {name: value for name, value in given.items() if value}

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that are read, each once."""
        named = [condition.measure for condition in self.conditions]
        return tuple(dict.fromkeys([*named, self.weight] if self.weight else named))

    def apply(self, sample: CodedSample, codes: Sequence[LogitsCodes | None]) -> tuple[Array, Array | None]:
        """(which tokens of a sample are learned, bool [T]; weights of its positions, float32 [T] or None).

        Position t decides on token t + 1. A token is learned if it was and all conditions hold; one whose
        weight is not known is not.

        codes: of the sample, for each cache.
        """
        values = {name: measure(name, sample, codes) for name in self.measures}
        keep_T = np.ones(len(sample.loss_mask), np.bool_)
        for condition in self.conditions:
            keep_T &= condition.holds(values[condition.measure])
        weight_T = values[self.weight] if self.weight else None
        if weight_T is not None:
            keep_T &= np.isfinite(weight_T)
        learned = np.zeros_like(sample.loss_mask)  # nothing predicts the first token
        learned[1:] = sample.loss_mask[1:] & keep_T[:-1]
        return learned, weight_T


def measure(name: str, sample: CodedSample, codes: Sequence[LogitsCodes | None]) -> Array:
    """A measure of each position of a sample, float32 [T], nats; or the random number, float64 [T].

    codes: of the sample, for each cache.
    """
    if name == RANDOM:
        return position_draws(sample.id, len(sample.loss_mask), seed=0)
    first = codes[0]
    if name == "disagreement":
        surprises = [-decode_labels(one.label_logprob) for one in codes if one is not None]
        assert len(surprises) == len(codes)
        return np.asarray(np.max(surprises, axis=0) - np.min(surprises, axis=0))
    assert first is not None
    return decode_entropy(first.entropy) if name == "entropy" else -decode_labels(first.label_logprob)


def parse_select(text: str) -> tuple[Condition, ...]:
    """The conditions of --select; UserError for one that cannot be read."""
    return tuple(_condition(part, text) for part in text.split(","))


def _condition(part: str, text: str) -> Condition:
    found = _CONDITION.fullmatch(part)
    if found is None:
        raise UserError(
            f"--select {text!r}: {part.strip()!r} is no condition; write MEASURE<X or MEASURE>X, X in nats "
            "or a quantile in %, several with commas between, e.g. 'surprise<8,entropy>20%'"
        )
    name, sign, number, percent = found.groups()
    _check_measure(name, f"--select {text!r}", (*MEASURES, RANDOM))
    value = float(number)
    if name == RANDOM and not percent:
        raise UserError(f"--select {text!r}: give a random share in %, e.g. 'random<25%'")
    if percent and not 0 < value < 100:
        raise UserError(f"--select {text!r}: give a quantile above 0% and below 100%")
    if percent:
        bound = value / 100 if name == RANDOM else np.nan
        return Condition(measure=name, above=sign == ">", bound=bound, percent=value)
    return Condition(measure=name, above=sign == ">", bound=value)


def parse_weight(text: str) -> str:
    """The measure of --weight; UserError for none that there is."""
    _check_measure(text, f"--weight {text!r}", MEASURES)
    return text


def _check_measure(name: str, where: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"{where}: {name!r} is no measure; choose {', '.join(known)}")
