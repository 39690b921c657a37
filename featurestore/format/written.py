"""Texts that a model wrote so that the teacher can score them, kept before anything of them is captured.

A text is known by its writer (weights, sampling, seed), its prompt and its number, so no request writes one
twice. Files are pieces of what one run set out to write, `written/<writer>/<piece>.json`; the name says which
texts are in it, and whoever publishes a name first has written them. Samples are made of them elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.schema import MAX_SEED, MAX_TOKENS, MAX_VOCAB
from featurestore.identity import DIGEST, canonical_json, check_id, check_int, digest, header, seal, unseal
from featurestore.storage.files import MAX_RECORD_BYTES, writing
from featurestore.storage.protocol import WRITTEN, Root

Array = npt.NDArray[np.int32]
Key = tuple[str, int]
"""Which text of a writer: the id of its prompt, and its number (from 0) among those of the prompt."""


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """What a text depends on besides its prompt and number.

    digest: 32 or more hex digits, of the writer's weights. engine, dtype: how it runs. temperature: 0 takes
    the most probable token. top_p: draw from the smallest set of tokens with this mass. max_tokens: of one
    text. seed. ends: the token ids that end a text, ascending; the text holds the one that ended it.
    """

    digest: str
    engine: str
    dtype: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.top_p)
        if not all(type(value) is float and math.isfinite(value) for value in numbers):
            raise StoreFormatError("writer: temperature and top_p are numbers with a fraction")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise StoreFormatError("writer: temperature is at least 0, top_p in (0, 1]")
        if not all(isinstance(name, str) and name for name in (self.digest, self.engine, self.dtype)):
            raise StoreFormatError("writer: digest, engine and dtype are names")
        check_int(self.max_tokens, 1, MAX_TOKENS, "writer: max_tokens")
        check_int(self.seed, 0, MAX_SEED, "writer: seed")
        for end in self.ends:
            check_int(end, 0, MAX_VOCAB, "writer: ends")

    @cached_property
    def id(self) -> str:
        """32 hex digits: the digest of the canonical JSON."""
        return digest(canonical_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key per field."""
        return {**dataclasses.asdict(self), "ends": list(self.ends)}

    @classmethod
    def from_json(cls, value: object) -> WriterSpec:
        """The inverse of `to_json`; StoreFormatError for missing, unknown or impossible fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names or not isinstance(value["ends"], list):
            raise StoreFormatError("writer: wrong or missing fields")
        return cls(**{**value, "ends": tuple(value["ends"])})


@dataclass(frozen=True, eq=False)
class Text:
    """One written text. key: its prompt and number; tokens: int32 [T], T >= 1, without the prompt."""

    key: Key
    tokens: Array


def prompt_id(tokens: npt.NDArray[Any]) -> str:
    """32 hex digits that name the prompt `tokens` (int [T])."""
    return digest([b"distily-cache prompt v1\0", tokens.astype("<i4").tobytes()])


def piece_name(spec: WriterSpec, keys: Sequence[Key]) -> str:
    """written/<writer>/<piece>.json: the file of exactly these texts."""
    return f"{WRITTEN}/{spec.id}/{digest(canonical_json([list(key) for key in keys]))}.json"


def publish_texts(root: Root, spec: WriterSpec, texts: Sequence[Text]) -> list[Text]:
    """Keep a piece; returns the texts that the store holds from now on, another writer's if it was quicker.

    Raises StoreWriteError when the place refuses.
    """
    name = piece_name(spec, [text.key for text in texts])
    rows = [[*text.key, text.tokens.tolist()] for text in texts]
    with writing("written texts", root.location):
        won = root.publish(name, seal({**header("written"), "writer": spec.to_json(), "texts": rows}))
    return list(texts) if won else read_piece(root, name)[1]


def piece_names(root: Root, writer: str | None = None) -> list[str]:
    """Names of all pieces, or of those of one writer (WriterSpec.id)."""
    writers = root.names(WRITTEN) if writer is None else [writer]
    folders = [f"{WRITTEN}/{name}" for name in writers if DIGEST.fullmatch(name)]
    return [
        f"{folder}/{name}"
        for folder in folders
        for name in root.names(folder)
        if name.endswith(".json") and DIGEST.fullmatch(name.removesuffix(".json"))
    ]


def read_piece(root: Root, name: str) -> tuple[WriterSpec, list[Text]]:
    """A piece, checked against its seal and its name.

    Raises CorruptionError for damage, StoreFormatError for what no writer can have written.
    """

    def parse(data: bytes, where: str) -> tuple[WriterSpec, list[Text]]:
        value = unseal(data, where, "written")
        spec = WriterSpec.from_json(value.get("writer"))
        rows = value.get("texts")
        if not isinstance(rows, list) or not rows:
            raise StoreFormatError(f"{where}: no texts")
        texts = [_text(row, spec, where) for row in rows]
        if piece_name(spec, [text.key for text in texts]) != name:
            raise CorruptionError(f"{where}: these are the texts of another file")
        return spec, texts

    return root.load(name, parse)


def read_texts(root: Root, spec: WriterSpec) -> dict[Key, Array]:
    """All that this writer has written here. Of two texts with one key the first in order of names counts."""
    names = piece_names(root, spec.id)
    root.fetch(dict.fromkeys(names, MAX_RECORD_BYTES))
    found: dict[Key, Array] = {}
    for text in _all(root, names):
        found.setdefault(text.key, text.tokens)
    return found


def _all(root: Root, names: Iterable[str]) -> Iterable[Text]:
    for name in names:
        yield from read_piece(root, name)[1]


def _text(row: object, spec: WriterSpec, where: str) -> Text:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[2], list):
        raise StoreFormatError(f"{where}: a text is [prompt, number, tokens]")
    key = (check_id(row[0], DIGEST, where), check_int(row[1], 0, MAX_SEED, where))
    check_int(len(row[2]), 1, spec.max_tokens, f"{where}: tokens of a text")
    if set(map(type, row[2])) != {int} or not 0 <= min(row[2]) <= max(row[2]) <= MAX_VOCAB:
        raise StoreFormatError(f"{where}: a text is made of token ids")
    if set(spec.ends).intersection(row[2][:-1]):
        raise StoreFormatError(f"{where}: a text goes on behind its end")
    return Text(key, np.asarray(row[2], dtype=np.int32))
