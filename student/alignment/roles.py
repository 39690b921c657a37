"""The roles of special tokens, by which those of one tokenizer are found in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from student.alignment.vocabulary import Vocabulary

BOS, EOS, PAD, UNK = "bos", "eos", "pad", "unk"
TURN_START, TURN_END = "turn_start", "turn_end"
# What special tokens mean in the chat templates and documents of well-known families, whatever a tokenizer's
# configuration calls them: ChatML's start of a turn is also the BOS of some.
KNOWN = {
    "<|im_start|>": TURN_START,  # ChatML: Qwen, SmolLM, Yi, ...
    "<|im_end|>": TURN_END,
    "<|start_header_id|>": TURN_START,  # Llama 3
    "<|eot_id|>": TURN_END,
    "<|header_start|>": TURN_START,  # Llama 4
    "<|eot|>": TURN_END,
    "<start_of_turn>": TURN_START,  # Gemma
    "<end_of_turn>": TURN_END,
    "<|start_of_role|>": TURN_START,  # Granite
    "<|end|>": TURN_END,  # Phi
    "<s>": BOS,
    "<bos>": BOS,
    "<|begin_of_text|>": BOS,
    "<|startoftext|>": BOS,
    "[CLS]": BOS,
    "</s>": EOS,
    "<eos>": EOS,
    "<|end_of_text|>": EOS,
    "<|endoftext|>": EOS,
    "[SEP]": EOS,
    "<pad>": PAD,
    "[PAD]": PAD,
    "<unk>": UNK,
    "[UNK]": UNK,
}
SILENT = frozenset((BOS, EOS, PAD, UNK))


def roles_of(tokenizer: Any, special: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
    """The roles of each special token (id -> text): its text, what it is known as, what it is configured as.

    A tokenizer's own choice for a role comes first. A token that stands for unknown text is one even where it
    is not marked as special.
    """
    configured: dict[int, list[str]] = {}
    for role in (EOS, BOS, PAD, UNK):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None and (index in special or role == UNK):
            configured.setdefault(index, []).append(role)
    names = {index: tokenizer.convert_ids_to_tokens(index) for index in configured} | dict(special)
    return {index: _roles(text, configured.get(index, [])) for index, text in names.items()}


def _roles(text: str, configured: list[str]) -> tuple[str, ...]:
    """What begins a turn is BOS only in name, as what ends one or a text is padding and unknown text."""
    known = KNOWN.get(text)
    if known == TURN_START:
        configured = []
    elif known in (TURN_END, EOS) or EOS in configured:
        configured = [role for role in configured if role == EOS]
    return tuple(dict.fromkeys([text, *([known] if known else []), *configured]))


def written_out(roles: tuple[str, ...]) -> bytes:
    """What becomes of a special token that the student has no counterpart of: its text, which still tells
    where a turn ends or a file begins; or nothing, of BOS, EOS, padding and unknown text.
    """
    return b"" if len(roles) > 1 and roles[1] in SILENT else roles[0].encode()


def match_specials(teacher: Vocabulary, student: Vocabulary) -> dict[int, int]:
    """Teacher's special token -> the student's of the same text, else of the same role; without those that
    have none.

    Example: SmolLM2's <|im_end|>, which ends turns and texts, becomes Llama 3's <|eot_id|>, and the </s> of
    a student that knows no turns.
    """
    by_role: dict[str, int] = {}
    for index, roles in student.roles.items():
        for role in roles:
            by_role.setdefault(role, index)
    found = {
        index: next((by_role[role] for role in roles if role in by_role), -1)
        for index, roles in teacher.roles.items()
    }
    return {index: other for index, other in found.items() if other >= 0}


def shared_ids(teacher: Vocabulary, student: Vocabulary) -> npt.NDArray[np.int64]:
    """The student's id of the same bytes, or of the same role, for each of the teacher's: int64 [V], -1 where
    there is none.

    Several ids of the teacher can share one of the student's. Of two ids of the student with the same bytes
    the one is taken that is not merely a byte (<0x41>), with which its tokenizer writes no text.
    """
    by_text = {text: index for index, text in enumerate(student.texts) if text}
    bytes_only = set(student.byte_ids)
    by_text |= {text: i for i, text in enumerate(student.texts) if text and i not in bytes_only}
    shared = np.fromiter((by_text.get(text, -1) for text in teacher.texts), np.int64, len(teacher.texts))
    for index, other in match_specials(teacher, student).items():
        shared[index] = other
    return shared
