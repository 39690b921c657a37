"""How chat templates open and close a turn, and a teacher's turns in the form of a student's template.

A form is known by its special tokens. Mistral's [INST] ... [/INST] is none of these: who speaks behind it
depends on what came before, and its white space on the version; it stays text for students without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from student.alignment.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TurnForm:
    """How a template writes turns.

    Args:
        openings: by role, what opens a turn: special tokens and the text behind each, in turn.
        end: the special token that ends a turn.
        gap: the text between that and the next turn.
    """

    openings: Mapping[str, tuple[str, ...]]
    end: str
    gap: str

    def known_to(self, names: Mapping[str, int]) -> bool:
        """Whether a tokenizer has all of these special tokens."""
        return self.end in names and all(
            name in names for pieces in self.openings.values() for name in pieces[::2]
        )


_ROLES = ("system", "user", "assistant", "tool")
_GEMMA = {"user": "user", "assistant": "model"}
FORMS = (
    # ChatML: Qwen, SmolLM, Yi
    TurnForm(openings={role: ("<|im_start|>", f"{role}\n") for role in _ROLES}, end="<|im_end|>", gap="\n"),
    # Llama 3
    TurnForm(
        openings={
            role: ("<|start_header_id|>", "ipython" if role == "tool" else role, "<|end_header_id|>", "\n\n")
            for role in _ROLES
        },
        end="<|eot_id|>",
        gap="",
    ),
    # Gemma, which has no turns of the system
    TurnForm(
        openings={role: ("<start_of_turn>", f"{name}\n") for role, name in _GEMMA.items()},
        end="<end_of_turn>",
        gap="\n",
    ),
    # Phi 3
    TurnForm(
        openings={role: (f"<|{role}|>", "\n") for role in ("system", "user", "assistant")},
        end="<|end|>",
        gap="\n",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A part of a sample: text, one of the teacher's special tokens, or tokens of the student in their place.

    Args:
        text: bytes of text; b"" for others.
        special: the teacher's special token, -1 for others.
        ids: the student's tokens; None for text and special tokens.
        length: how many units of the teacher's it stands for.
        opens: whether it opens a turn.
    """

    text: bytes = b""
    special: int = -1
    ids: tuple[int, ...] | None = None
    length: int
    opens: bool = False


class Turns:
    """Writes a teacher's turns as a student's template does."""

    def __init__(
        self,
        teacher: tuple[TurnForm, Mapping[str, int]],
        student: tuple[TurnForm, Mapping[str, int]],
        tokens: Callable[[str], Sequence[int]],
    ) -> None:
        """teacher, student: the form of each and the ids of its special tokens; tokens: the student's, of a
        text.
        """
        (theirs, names), (ours, own_names) = teacher, student
        self._openings = [
            (
                tuple(
                    piece.encode() if n % 2 else names[piece] for n, piece in enumerate(theirs.openings[role])
                ),
                tuple(
                    index
                    for n, piece in enumerate(pieces)
                    for index in (tokens(piece) if n % 2 else [own_names[piece]])
                ),
            )
            for role, pieces in ours.openings.items()
            if role in theirs.openings
        ]
        self._end, self._gap = names[theirs.end], theirs.gap.encode()
        self._new_gap = tuple(tokens(ours.gap)) if ours.gap else ()
        self._same_gap = ours.gap == theirs.gap

    def rewritten(self, items: Sequence[Item]) -> list[Item]:
        """The items with the student's tokens in place of what opens a turn or lies between turns."""
        queue, found, place = list(items), list[Item](), 0
        while place < len(queue):
            opening, count, rest = self._opening(queue, place)
            if opening is not None:
                found.append(opening)
                place += count
                if rest:
                    place -= 1
                    queue[place] = Item(text=rest, length=len(rest))
                continue
            found.append(queue[place])
            place += 1
            if found[-1].special != self._end or self._same_gap:
                continue
            if self._gap and queue[place : place + 1] == [Item(text=self._gap, length=len(self._gap))]:
                found.append(Item(ids=self._new_gap, length=len(self._gap)))
                place += 1
            elif not self._gap and self._opening(queue, place)[0] is not None:
                found.append(Item(ids=self._new_gap, length=0))
        return found

    def _opening(self, items: Sequence[Item], place: int) -> tuple[Item | None, int, bytes]:
        """(what opens a turn there, how many items it takes, what text it leaves of the last)."""
        for pieces, ids in self._openings:
            taken = items[place : place + len(pieces)]
            if len(taken) == len(pieces) and all(map(_fits, taken[:-1], pieces[:-1])):
                text = pieces[-1]
                assert isinstance(text, bytes)
                if taken[-1].text.startswith(text):
                    rest = taken[-1].text[len(text) :]
                    length = sum(item.length for item in taken) - len(rest)
                    return Item(ids=ids, length=length, opens=True), len(pieces), rest
        return None, 0, b""


def _fits(item: Item, piece: bytes | int) -> bool:
    return item.text == piece if isinstance(piece, bytes) else item.special == piece


def turns_between(
    teacher: Vocabulary, student: Vocabulary, tokens: Callable[[str], Sequence[int]]
) -> Turns | None:
    """How to write the teacher's turns as the student's; None where one has no form that is known, or the
    student has the teacher's. tokens: the student's, of a text.
    """
    theirs, ours = (
        {roles[0]: index for index, roles in vocabulary.roles.items()} for vocabulary in (teacher, student)
    )
    form = next((form for form in FORMS if form.known_to(theirs)), None)
    if form is None or form.known_to(ours):
        return None
    other = next((form for form in FORMS if form.known_to(ours)), None)
    return None if other is None else Turns((form, theirs), (other, ours), tokens)
