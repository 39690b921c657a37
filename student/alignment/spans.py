"""Where two tokenizers have read the same: pairs of positions between which lie spans.

Shape letters: T teacher tokens, S student tokens, A aligned pairs.
"""
# ruff: noqa: N815  (shape suffixes on dataclass fields)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from student.alignment.roles import BOS
from student.alignment.vocabulary import FIRST, NEVER, SPACE, Vocabulary

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """Positions at which teacher and student predict from the same context.

    Args:
        boundaries_A2: int64 [A, 2], ascending pairs (t, s): after teacher token t and student token s exactly
            the same bytes and special tokens have been read. Between two neighbours lies a span.
    """

    boundaries_A2: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """How far a tokenizer has read.

    Args:
        ends: int64 [T], ascending; the units (bytes, special tokens) that were read with each token.
        barred: int64, ends that are no boundary for this side, as it goes on with a space that no text has.
    """

    ends: Ints
    barred: Ints


def reading(widths_T: Ints, spaces: list[int]) -> Reading:
    """How far tokens of these widths read, of which those at `spaces` begin with a space that no text has."""
    ends_T = np.cumsum(widths_T)
    barred = [ends_T[place] - widths_T[place] for place in spaces if widths_T[place]]
    return Reading(ends=ends_T, barred=np.asarray(barred, np.int64))


def front_tokens(ids_T: Ints, vocabulary: Vocabulary) -> int:
    """How many tokens in front of a sample only begin a text: those that the tokenizer puts there, or BOS."""
    prefix = vocabulary.prefix
    if prefix and tuple(ids_T[: len(prefix)].tolist()) == prefix:
        return len(prefix)
    return int(len(ids_T) > 0 and BOS in vocabulary.roles.get(int(ids_T[0]), ()))


def dummy_spaces(ids_T: Ints, vocabulary: Vocabulary) -> list[int]:
    """The places of the tokens that begin with a space which the tokenizer put in front of text.

    Where a sample begins within a text, that space can be one of the text; nobody can tell.
    """
    if vocabulary.space == NEVER:
        return []
    special_T = vocabulary.special_V[ids_T]
    begins = np.flatnonzero(~special_T & np.append(True, special_T)[: len(ids_T)])
    if vocabulary.space == FIRST:
        begins = begins[:1]
    return [place for place in begins.tolist() if vocabulary.texts[ids_T[place]][:1] == SPACE]


def meet(teacher: Reading, student: Reading) -> Alignment:
    """The pairs of positions at which both have read equally many units; of several tokens in a row that add
    nothing, the last counts.
    """
    last_T, last_S = _lasts(teacher.ends), _lasts(student.ends)
    ends, at_T, at_S = np.intersect1d(
        teacher.ends[last_T], student.ends[last_S], assume_unique=True, return_indices=True
    )
    kept = ~np.isin(ends, np.setxor1d(teacher.barred, student.barred))
    return Alignment(boundaries_A2=np.stack([last_T[at_T[kept]], last_S[at_S[kept]]], axis=1))


def _lasts(ends: Ints) -> Ints:
    """The last place of each value."""
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], True)[: len(ends)])
