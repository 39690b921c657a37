"""A student's tokenizer on pieces of text: its tokens, and which bytes of the text each of them stands for.

Shape letters: S tokens of a piece, C its characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import combining

import numpy as np
import numpy.typing as npt

from student.alignment.roles import UNK
from student.alignment.vocabulary import FIRST, NEVER, SPACE, Vocabulary

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The tokens of a piece of text.

    Args:
        ids: int64 [S].
        starts, ends: int64 [S], the bytes of the piece that each token stands for.
        barred: int64, ends of tokens, or 0, that are no boundary: in front of a space that no text has, or
            where the tokenizer does not say what belongs to which token.
        length: the bytes of the piece.
        changed: how many bytes of the piece the tokens stand for in another form only, or not at all.
        undecodable: whether the piece is no whole characters.
    """

    ids: Ints
    starts: Ints
    ends: Ints
    barred: Ints
    length: int
    changed: int = 0
    undecodable: bool = False


class TextEncoder:
    """A tokenizer on text that is nothing but text: what looks like a special token in it is none.

    Where the ids spell the text byte for byte, ends are exact, within characters too. Else (normalisers,
    lower case, unknown characters) they are those that the tokenizer reports in characters, where it reports
    them without doubt.
    """

    def __init__(self, tokenizer: str, vocabulary: Vocabulary) -> None:
        """tokenizer: the content of tokenizer.json."""
        config = json.loads(tokenizer) | {"post_processor": None, "truncation": None, "padding": None}
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._whole = _load(config)
        self._inner = _load(_without_space(config))
        model = config["model"]
        complete = model["type"] != "BPE" or bool(model["unk_token"])
        # A BPE drops what it has no token for, and reports wrong places for all that follows.
        self._drops = not complete and min(vocabulary.byte_ids) < 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer, self._vocabulary)

    def encode(self, text: str, place: str) -> Encoded:
        """The tokens of a piece of text.

        place: "first" of a sample, "later", behind a special token, or "inner", within a text.
        """
        spaced = place == "first" or (place == "later" and self._vocabulary.space != FIRST)
        backend = self._whole if spaced else self._inner
        ids = np.asarray(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)
        body = text.encode()
        spelled = b"".join([self._vocabulary.texts[index] for index in ids.tolist()])
        if spelled == body:
            return self._exact(ids, 0)
        if spelled == SPACE + body and self._vocabulary.space != NEVER:
            return self._exact(ids, 1)
        return self._reported(backend, text, body, place)

    def _exact(self, ids: Ints, spaces: int) -> Encoded:
        ends = np.maximum(np.cumsum(self._vocabulary.widths_V[ids]) - spaces, 0)
        barred = [0] if spaces and ends[0] else []
        return Encoded(
            ids=ids,
            starts=np.append(0, ends[:-1]),
            ends=ends,
            barred=np.asarray(barred, np.int64),
            length=int(ends[-1]) if len(ends) else 0,
        )

    def _reported(self, backend: Any, text: str, body: bytes, place: str) -> Encoded:
        """Ends as the tokenizer reports them, in characters of the text."""
        found = backend.encode(text, add_special_tokens=False)
        cut = self._look_alike(found, text)
        if cut:
            return join([self.encode(text[:cut], place), self.encode(text[cut:], "inner")])
        offsets_C = _byte_offsets(text)
        ids, chars_S2 = np.asarray(found.ids, np.int64), np.asarray(found.offsets, np.int64).reshape(-1, 2)
        # Normalisers put combining marks in order, join them with the character in front, or drop them.
        marks_C = np.array([*(combining(char) > 0 for char in text), False])
        behind_C = np.minimum.accumulate(np.where(marks_C, len(text), np.arange(len(text) + 1))[::-1])[::-1]
        reached_S = behind_C[np.maximum.accumulate(chars_S2[:, 1])]
        next_S = np.append(np.minimum.accumulate(chars_S2[::-1, 0])[::-1], len(text))
        # Characters that no token reports may belong to the one in front or behind, white space aside.
        solid_C = np.cumsum([0, *(not char.isspace() for char in text)])
        clear_S = (reached_S <= next_S[1:]) & (solid_C[next_S[1:]] == solid_C[reached_S])
        ends_S = offsets_C[reached_S]
        spelled = [self._vocabulary.texts[index] for index in ids.tolist()]
        barred = np.setdiff1d(ends_S, ends_S[clear_S])
        if self._drops and b"".join(spelled) != _normalised(backend, text):
            barred = np.union1d(barred, ends_S[ends_S > _common(b"".join(spelled), body)])
        if (b"".join(spelled)[:1] == SPACE != body[:1]) or solid_C[next_S[0]]:
            barred = np.union1d(barred, [0])
        return Encoded(
            ids=ids,
            starts=offsets_C[chars_S2[:, 0]],
            ends=ends_S,
            barred=barred,
            changed=_changed(spelled, ends_S, clear_S, body),
            length=len(body),
        )

    def _look_alike(self, found: Any, text: str) -> int:
        """Where to cut text that became a special token or a named byte, to prevent it; 0 where none did."""
        vocabulary = self._vocabulary
        for index, token, (start, end) in zip(found.ids, found.tokens, found.offsets, strict=True):
            roles = vocabulary.roles.get(index)
            named = token == text[start:end] and (roles is not None or index in vocabulary.byte_ids)
            if end - start > 1 and (named or (roles is not None and UNK not in roles)):
                return int(start) + 1
        return 0


def join(pieces: Sequence[Encoded]) -> Encoded:
    """Pieces of text that follow each other, as one."""
    offsets = np.cumsum([0, *(piece.length for piece in pieces)])
    moved = list(zip(pieces, offsets[:-1], strict=True))
    return Encoded(
        ids=np.concatenate([piece.ids for piece in pieces]),
        starts=np.concatenate([piece.starts + offset for piece, offset in moved]),
        ends=np.concatenate([piece.ends + offset for piece, offset in moved]),
        barred=np.concatenate([piece.barred + offset for piece, offset in moved]),
        changed=sum(piece.changed for piece in pieces),
        length=int(offsets[-1]),
    )


def _byte_offsets(text: str) -> Ints:
    """The byte at which each character begins, and the length of all: int64 [C + 1]."""
    points_C = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths_C = 1 + (points_C >= 0x80) + (points_C >= 0x800).astype(np.int64) + (points_C >= 0x10000)
    return np.append(0, np.cumsum(widths_C))


def _normalised(backend: Any, text: str) -> bytes:
    normalised: str = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    return normalised.encode()


def _common(one: bytes, other: bytes) -> int:
    """The length of the common prefix."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _changed(spelled: list[bytes], ends_S: Ints, clear_S: npt.NDArray[np.bool_], body: bytes) -> int:
    """The bytes of a text that its tokens do not spell, a space in front of a token aside."""
    same = first = start = 0
    for last in np.flatnonzero(clear_S).tolist():
        end = int(ends_S[last])
        own = b"".join(spelled[first : last + 1])
        same += (end - start) * (own in (body[start:end], SPACE + body[start:end]))
        first, start = last + 1, end
    return len(body) - same


def _load(config: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_space(stage: Any) -> Any:
    """A tokenizer.json, or a part of it, that puts no space in front of text."""
    if isinstance(stage, list):
        return [_without_space(part) for part in stage if not _is_prepend(part)]
    if not isinstance(stage, dict):
        return stage
    changes: dict[str, Any] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    kept = {key: value for key, value in stage.items() if not _is_prepend(value)}
    return {
        **dict.fromkeys(stage, None),
        **{key: _without_space(value) for key, value in kept.items() if key in _STAGES},
        **{key: value for key, value in kept.items() if key not in _STAGES},
        **changes.get(stage.get("type", ""), {}),
    }


_STAGES = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")


def _is_prepend(stage: Any) -> bool:
    return isinstance(stage, dict) and stage.get("type") == "Prepend"
