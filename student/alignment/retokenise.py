"""A sample of the teacher's tokens as tokens of a student with another tokenizer, and where the two agree.

Shape letters: T teacher tokens, S student tokens, U units of what is read (bytes of text, special tokens).
"""
# ruff: noqa: N815  (shape suffixes on dataclass fields)

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from student.alignment.chat import Item, turns_between
from student.alignment.encoding import Encoded, TextEncoder, join
from student.alignment.roles import match_specials, written_out
from student.alignment.spans import Alignment, Bools, Ints, Reading, dummy_spaces, front_tokens, meet, reading
from student.alignment.vocabulary import read_vocabulary

# The units of a special token: more than one, so that several of the student's tokens can stand for it, of
# which only the last ends where it does.
_SPECIAL = 2
# How Python spells bytes that are no UTF-8, one by one.
_UNDECODABLE = re.compile("([\udc80-\udcff]+)")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was aligned, and what was lost on the way; counts of samples add up.

    Args:
        teacher_tokens, student_tokens: tokens of each.
        aligned: positions at which both have read the same.
        text_bytes: bytes of text.
        undecodable_bytes: those at the ends of a sample, or within, that are no whole character.
        changed_bytes: those that the student's tokenizer writes in another form or not at all.
        turns: turns that are opened as the student's chat template does.
        specials_mapped: special tokens for which the student has a token of the same text or role, or that
            are part of what opens a turn.
        specials_as_text: special tokens that became text.
        specials_dropped: special tokens of which nothing is left; BOS in front is none.
    """

    teacher_tokens: int = 0
    student_tokens: int = 0
    aligned: int = 0
    text_bytes: int = 0
    undecodable_bytes: int = 0
    changed_bytes: int = 0
    turns: int = 0
    specials_mapped: int = 0
    specials_as_text: int = 0
    specials_dropped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Retokenised:
    """A sample as the student reads it.

    Args:
        ids_S: int64 [S].
        loss_mask_S: bool [S], the tokens that are learned: all of their bytes are of learned teacher tokens.
        alignment: positions of equal context; t counts the teacher's tokens, s those of `ids_S`.
        counts: what was aligned and what was lost.
    """

    ids_S: Ints
    loss_mask_S: Bools
    alignment: Alignment
    counts: Counts


class Retokeniser:
    """Writes samples of a teacher as tokens of a student.

    The bytes of the teacher's text are tokenised anew, behind what the student's tokenizer puts in front of a
    text. Special tokens become those of the same text or role, else their text or nothing (`written_out`);
    what opens and closes a turn in a known chat template becomes that of the student's (`turns_between`).
    Bytes that are no whole character, where a sample was cut within one, become tokens of single bytes, which
    are not learned, or nothing.

    On samples of 256 tokens it takes two to four times the CPU time of the tokenizer alone: one core
    makes 1.2 MB of text a second into a BPE of 8,192, and 1.5 MB into bytes.

    Example:
        >>> teacher, student = (AutoTokenizer.from_pretrained(name) for name in ("teacher", "student"))
        >>> retokenise = Retokeniser(teacher, student)
        >>> sample = retokenise(ids_T, loss_mask_T)
        >>> for t, s in sample.alignment.boundaries_A2: ...
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        """teacher, student: tokenizers of transformers.

        Raises:
            UserError: what the ids of one of them stand for cannot be read.
        """
        self.teacher, self.student = read_vocabulary(teacher), read_vocabulary(student)
        self._encoder = TextEncoder(student.backend_tokenizer.to_str(), self.student)
        self.specials = match_specials(self.teacher, self.student)
        self._turns = turns_between(
            self.teacher, self.student, lambda text: self._encoder.encode(text, "later").ids.tolist()
        )
        self._texts = list(self.teacher.texts)
        for index, roles in self.teacher.roles.items():
            self._texts[index] = b"" if index in self.specials else written_out(roles)
        self._as_text_V = np.fromiter(map(len, self._texts), np.bool_) & self.teacher.special_V
        self._mapped_V = np.zeros(len(self._texts), np.bool_)
        self._mapped_V[list(self.specials)] = True
        # Between these tokens lies text. What a turn is opened with may be several tokens of either side.
        self._breaks_V = self.teacher.special_V & (~self._as_text_V | (self._turns is not None))
        self._widths_V = np.fromiter(map(len, self._texts), np.int64) + _SPECIAL * self._mapped_V

    def __call__(self, ids: npt.ArrayLike, loss_mask: npt.ArrayLike) -> Retokenised:
        """The student's tokens of a sample; ids: int [T], loss_mask: bool [T]."""
        ids_T, mask_T = np.asarray(ids, np.int64), np.asarray(loss_mask, np.bool_)
        front, spaces = front_tokens(ids_T, self.teacher), dummy_spaces(ids_T, self.teacher)
        widths_T = self._widths_V[ids_T]
        widths_T[spaces] -= 1
        widths_T[:front] = 0
        texts = [self._texts[index] for index in ids_T.tolist()]
        for place in spaces:
            texts[place] = texts[place][1:]
        items = self._items(ids_T, texts, front)
        pieces = [_units(self.student.prefix, width=0), *self._pieces(items)]
        found = join(pieces)
        learned_U = np.repeat(mask_T, widths_T)
        assert found.length == len(learned_U)
        ends = np.cumsum([piece.length for piece in pieces])
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            learned_U[end - piece.length : end] &= not piece.undecodable
        learned_S = _learned(found, learned_U)
        learned_S[: len(self.student.prefix)] = False
        student = Reading(ends=found.ends, barred=found.barred)
        alignment = meet(reading(widths_T, spaces), student)
        specials_T, mapped_T, as_text_T = (
            table_V[ids_T[front:]] for table_V in (self.teacher.special_V, self._mapped_V, self._as_text_V)
        )
        mapped, as_text = int(mapped_T.sum()), int(as_text_T.sum())
        written = as_text if self._turns is None else sum(self._is_written(item) for item in items)
        counts = Counts(
            teacher_tokens=len(ids_T),
            student_tokens=len(found.ids),
            aligned=len(alignment.boundaries_A2),
            text_bytes=len(learned_U) - _SPECIAL * mapped,
            undecodable_bytes=sum(piece.length for piece in pieces if piece.undecodable),
            changed_bytes=found.changed,
            turns=sum(item.opens for item in items),
            specials_mapped=mapped + as_text - written,
            specials_as_text=written,
            specials_dropped=int(specials_T.sum()) - mapped - as_text,
        )
        return Retokenised(ids_S=found.ids, loss_mask_S=learned_S, alignment=alignment, counts=counts)

    def _is_written(self, item: Item) -> bool:
        """Whether it is a special token that becomes text."""
        return item.special >= 0 and bool(self._as_text_V[item.special])

    def _items(self, ids_T: Ints, texts: list[bytes], front: int) -> list[Item]:
        """The stretches of text and the special tokens of a sample, behind those in front."""
        items = []
        for start, end in _stretches(self._breaks_V[ids_T], front):
            index = int(ids_T[start])
            if self._breaks_V[index]:
                items.append(Item(special=index, length=int(self._widths_V[index])))
            elif text := b"".join(texts[start:end]):
                items.append(Item(text=text, length=len(text)))
        return items if self._turns is None else self._turns.rewritten(items)

    def _pieces(self, items: list[Item]) -> Iterator[Encoded]:
        """The student's tokens of each item."""
        place = "first"
        for item in items:
            if item.ids is not None:
                yield _marker(item)
            elif item.special in self.specials:
                yield _units([self.specials[item.special]], _SPECIAL)
            else:
                for part, raw in _characters(item.text or self._texts[item.special]):
                    yield self._bytes(raw) if raw else self._encoder.encode(part, place)
                    place = "inner"
            place = "later"

    def _bytes(self, raw: bytes) -> Encoded:
        """Tokens of single bytes, or none where the student has not got them."""
        ids = [self.student.byte_ids[byte] for byte in raw]
        if min(ids) >= 0:
            return replace(_units(ids), undecodable=True)
        return replace(_units([]), length=len(raw), barred=np.zeros(1, np.int64), undecodable=True)


def _stretches(breaks_T: Bools, start: int) -> Iterator[tuple[int, int]]:
    """The tokens [start, end) between breaks, and each break by itself, from `start` on."""
    for place in (start + np.flatnonzero(breaks_T[start:])).tolist():
        if start < place:
            yield start, place
        yield place, place + 1
        start = place + 1
    if start < len(breaks_T):
        yield start, len(breaks_T)


def _characters(body: bytes) -> Iterator[tuple[str, bytes]]:
    """The text of bytes, and in between what is no text: either is empty."""
    for index, part in enumerate(_UNDECODABLE.split(body.decode(errors="surrogateescape"))):
        if part:
            yield ("", part.encode(errors="surrogateescape")) if index % 2 else (part, b"")


def _marker(item: Item) -> Encoded:
    """Tokens of which only the last ends where the teacher's do; without any, nothing goes on there."""
    ids = item.ids or ()
    ends = np.full(len(ids), min(1, item.length))
    ends[-1:] = item.length
    starts = np.append(0, ends)[: len(ids)]
    barred = np.zeros(0 if ids else 1, np.int64)
    return replace(_units(ids), starts=starts, ends=ends, barred=barred, length=item.length)


def _units(ids: Sequence[int], width: int = 1) -> Encoded:
    """Tokens of so many units each."""
    ends = width * np.arange(1, len(ids) + 1)
    return Encoded(
        ids=np.asarray(ids, np.int64),
        starts=ends - width,
        ends=ends,
        barred=np.zeros(0, np.int64),
        length=width * len(ids),
    )


def _learned(found: Encoded, learned_U: Bools) -> Bools:
    """Which tokens have learned units only; one without a unit goes with the next."""
    unlearned_U = np.append(0, np.cumsum(~learned_U))
    ends = np.minimum(np.maximum(found.ends, found.starts + 1), len(learned_U))
    learned_S: Bools = unlearned_U[ends] == unlearned_U[found.starts]
    return learned_S
