"""What the ids of a tokenizer stand for, read from its tokenizer.json: the bytes of each, or a special token.

Shape letters: V ids of the vocabulary.
"""
# ruff: noqa: N802  (shape suffixes on properties)

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from student.alignment.roles import roles_of
from student.errors import UserError

# Where a tokenizer puts a space in front of text that does not begin with one, as SentencePiece does:
# nowhere, in front of a whole text, or behind every special token too.
NEVER, FIRST, ALWAYS = "never", "first", "always"
SPACE = b" "


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """What the ids of a tokenizer stand for.

    Args:
        texts: the bytes of each id, V of them; b"" for special tokens and for ids without a token.
        roles: the roles of each special token, the most telling first; its own text is always the first
            ("<|im_end|>", "turn_end", "eos").
        byte_ids: the id of each single byte, 256 of them, -1 where there is none.
        prefix: the ids that the tokenizer puts in front of a text (BOS of most).
        space: NEVER, FIRST or ALWAYS, where it puts a space in front of text.

    Example:
        >>> vocabulary = read_vocabulary(AutoTokenizer.from_pretrained("teacher"))
        >>> b"".join(vocabulary.texts[id] for id in ids).decode()
    """

    texts: tuple[bytes, ...]
    roles: Mapping[int, tuple[str, ...]]
    byte_ids: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    space: str = NEVER

    @cached_property
    def special_V(self) -> npt.NDArray[np.bool_]:
        """Which ids are special tokens: bool [V]."""
        special_V = np.zeros(len(self.texts), np.bool_)
        special_V[list(self.roles)] = True
        return special_V

    @cached_property
    def widths_V(self) -> npt.NDArray[np.int64]:
        """How many bytes each id stands for: int64 [V]."""
        return np.fromiter(map(len, self.texts), np.int64, len(self.texts))


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers.

    Byte-level BPE; BPE and Unigram with ▁ for the space (SentencePiece), with or without byte fallback;
    WordPiece and whole words, whose spaces are a guess (see `_word`). Added tokens that are not special are
    text.

    Raises:
        UserError: it has no tokenizer.json, or one whose decoder does not say what bytes an id stands for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, from which the text of its ids "
            "is read; save it as a fast tokenizer (AutoTokenizer...save_pretrained)"
        )
    config = json.loads(backend.to_str())
    spelled = _spelling(config)
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    byte_names = _byte_names(config, vocabulary)
    roles = roles_of(
        tokenizer, {one["id"]: one["content"] for one in config["added_tokens"] if one["special"]}
    )
    texts = [b""] * (1 + max(vocabulary.values(), default=-1))
    byte_ids = [-1] * 256
    added = {one["id"] for one in config["added_tokens"]}
    for token, index in vocabulary.items():
        byte = byte_names.get(token)
        if byte is not None:
            texts[index], byte_ids[byte] = bytes([byte]), index
            roles.pop(index, None)
        elif index not in roles:
            texts[index] = spelled(token, index in added)
    probe = [texts[index] for index in backend.encode("a", add_special_tokens=False).ids]
    return Vocabulary(
        texts=tuple(texts),
        roles=roles,
        byte_ids=tuple(byte_ids),
        prefix=_prefix(backend),
        space=_space(backend, texts, roles) if b"".join(probe).startswith(SPACE) else NEVER,
    )


def _prefix(backend: Any) -> tuple[int, ...]:
    """The ids in front of a text."""
    whole, body = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return tuple(whole[:start])
    return ()


def _space(backend: Any, texts: list[bytes], roles: Mapping[int, tuple[str, ...]]) -> str:
    """Whether a space is put behind special tokens too, of a tokenizer that puts one in front of a text."""
    for index, (name, *_) in roles.items():
        first, *rest = backend.encode(f"{name}a", add_special_tokens=False).ids or [-1]
        if first == index:
            return ALWAYS if b"".join(texts[one] for one in rest).startswith(SPACE) else FIRST
    return ALWAYS


def _spelling(config: Mapping[str, Any]) -> Callable[[str, bool], bytes]:
    """(token, whether it was added) -> its bytes."""
    decoders = list(parts(config["decoder"]))
    kinds = {part["type"] for part in decoders}
    stages = kinds.union(
        *({part["type"] for part in parts(config[s])} for s in ("pre_tokenizer", "normalizer"))
    )
    if "ByteLevel" in stages:
        letters = byte_letters()
        return lambda token, added: _byte_level(token, added, letters)
    model = config["model"]
    if "WordPiece" in kinds or model["type"] in ("WordPiece", "WordLevel"):
        continuing = model.get("continuing_subword_prefix") or ""
        return lambda token, _: _word(token, continuing)
    replaced = [
        (part["pattern"].get("String"), part["content"]) for part in decoders if part["type"] == "Replace"
    ]
    replaced += [(part["replacement"], " ") for part in decoders if part["type"] == "Metaspace"]
    if not decoders or kinds - _READ or any(pattern is None for pattern, _ in replaced):
        names = ", ".join(sorted(kinds - _READ)) or ("a pattern" if decoders else "none")
        raise UserError(
            f"the tokenizer's decoder ({names}) does not say which bytes a token stands for; what is read "
            "are byte-level, SentencePiece-like and WordPiece tokenizers"
        )
    return lambda token, _: _replaced(token, replaced)


# Decoders of tokens one by one. Strip takes off the space in front of a text, which is looked at in ids.
_READ = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


def _byte_level(token: str, added: bool, letters: Mapping[str, int]) -> bytes:
    if added or any(letter not in letters for letter in token):
        return token.encode()
    return bytes(letters[letter] for letter in token)


def _replaced(token: str, pairs: list[tuple[str, str]]) -> bytes:
    for pattern, content in pairs:
        token = token.replace(pattern, content)
    return token.encode()


def _word(token: str, continuing: str) -> bytes:
    """A piece of a word, or a word: with a space in front unless it is punctuation, as nothing says whether
    there was one.
    """
    if continuing and token.startswith(continuing):
        return token[len(continuing) :].encode()
    return (" " + token if token[:1].isalnum() else token).encode()


def _byte_names(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The tokens that stand for a single byte: the letters of a byte-level tokenizer, or <0x00> to <0xFF>."""
    stages = (
        part["type"] for name in ("decoder", "pre_tokenizer", "normalizer") for part in parts(config[name])
    )
    if "ByteLevel" in stages:
        names = byte_letters()
    elif config["model"].get("byte_fallback"):
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    else:
        names = {}
    return {name: byte for name, byte in names.items() if name in vocabulary}


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level tokenizers write each byte -> the byte (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def parts(stage: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, pre-tokenizer or normaliser of tokenizer.json, sequences taken apart."""
    if stage is None:
        return
    if stage["type"] != "Sequence":
        yield stage
        return
    for name in ("decoders", "pretokenizers", "normalizers"):
        for part in stage.get(name, ()):
            yield from parts(part)
