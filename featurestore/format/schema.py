"""What a store holds: who the teacher is, which column groups there are, samples and their features.

Letters: T positions of a sample, D hidden size, V vocabulary, nnz head entries of all T rows together, M tail
draws of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.errors import StoreFormatError
from featurestore.format.codec import HIDDEN_DTYPES, decode_hidden, hidden_width
from featurestore.format.states.rotated import ROTATED
from featurestore.format.states.transform import TRANSFORMED, Basis
from featurestore.identity import canonical_json, check_int, digest

Array = npt.NDArray[Any]

MAX_TOP_K = 65_535
MAX_TAIL = 4_096
MAX_SEED = 2**63 - 1
MAX_LAYER = 9_999
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 100.0
MAX_VOCAB = 2**31 - 1
NO_DRAW = -1
# What a capture measures of the error of stored hidden states, summed up in commit records: fields of
# HiddenFeatures.
HIDDEN_STATS = ("squared_error", "squared_norm")
# Of a sample, and of a task: what a reader has to be ready to hold at once.
MAX_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """The teacher whose numbers a store holds, and how they were computed (the content of SPEC.json).

    `name` and `engine_version` are recorded and not compared; all other fields must match to extend.
    """

    name: str
    architecture: str
    digest: str
    tokenizer_digest: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    engine: str
    engine_version: str
    dtype: str
    quantization: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, is_int = getattr(self, field.name), field.type == "int"
            if is_int and (type(value) is not int or not 1 <= value <= MAX_VOCAB):
                raise StoreFormatError(f"teacher identity: {field.name} must be a positive integer")
            if not is_int and not isinstance(value, str):
                raise StoreFormatError(f"teacher identity: {field.name} must be a string")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key per field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> TeacherIdentity:
        """The inverse of `to_json`; StoreFormatError for missing, unknown or mistyped fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            raise StoreFormatError("teacher identity: wrong or missing fields")
        return cls(**value)

    def differences(self, other: TeacherIdentity) -> list[tuple[str, Any, Any]]:
        """(field, mine, theirs) of every compared field that differs."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("name", "engine_version")]
        return [
            (n, getattr(self, n), getattr(other, n)) for n in names if getattr(self, n) != getattr(other, n)
        ]


@dataclass(frozen=True)
class LogitsSpec:
    """The exact top of each row's distribution, and draws from the rest of it.

    The head is the smallest of mass >= top_p, at most top_k wide.

    Args:
        top_k: entries of a head, at most.
        top_p: where a head ends; None keeps top_k entries in every row (1.0 means the same and is turned into
            None).
        tail: how many draws from outside the head, each of weight (1 - head mass) / tail.
        seed: of the draws, which depend on it, the tokens and the position only.
        partial: only the heads are known, so entropy is NaN everywhere and label_logprob may be NaN; there
            are no draws then.

    Raises:
        StoreFormatError: a number is out of its range.

    Example:
        LogitsSpec(50, top_p=0.95, tail=24)
    """

    top_k: int
    top_p: float | None = None
    tail: int = 0
    seed: int = 0
    partial: bool = False

    def __post_init__(self) -> None:
        check_int(self.top_k, 1, MAX_TOP_K, "top_k")
        if type(self.partial) is not bool:
            raise StoreFormatError(f"partial must be true or false, not {self.partial!r}")
        check_int(self.tail, 0, 0 if self.partial else MAX_TAIL, "tail")
        check_int(self.seed, 0, MAX_SEED if self.tail else 0, "seed of the tail's draws")
        if self.top_p is None:
            return
        if type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1:
            raise StoreFormatError(f"top_p must be in (0, 1], not {self.top_p!r}")
        object.__setattr__(self, "top_p", None if self.top_p == 1 else float(self.top_p))

    @property
    def kind(self) -> str:
        """The name that `CacheReader.find` takes: "logits"."""
        return "logits"

    def to_json(self) -> dict[str, Any]:
        """Optional fields are left out when unset, so that a later field keeps today's group ids."""
        optional = {} if self.top_p is None else {"top_p": self.top_p}
        more = (("tail", self.tail), ("seed", self.seed), ("partial", self.partial))
        given = {name: value for name, value in more if value}
        return {"kind": "logits", "top_k": self.top_k, **optional, **given}


@dataclass(frozen=True)
class HiddenSpec:
    """A residual stream of the teacher.

    Args:
        layer: 0 is the embeddings, i the stream after block i, as in transformers' `output_hidden_states`.
        dtype: as stored: "f32", "bf16", "int8" or "fp8", these two with a scale for each position, or "int4"
            and "int2", about 0.55 and 0.3 bytes a number; of the last layer also "klt4" and "klt6", 4 and 6
            bits a number.
        positions: the share of the positions that are stored, in (0, 1]; which, featurestore.format.positions
            says.
        seed: of their choice.
        above: a smaller share of the same seed whose positions are not stored, as another group has them; in
            [0, positions).

    Raises:
        StoreFormatError: the layer, the share or the seed is out of its range, or the type is unknown.

    Example:
        HiddenSpec(20, "int8")
    """

    layer: int
    dtype: str = "bf16"
    positions: float = 1.0
    seed: int = 0
    above: float = 0.0

    def __post_init__(self) -> None:
        if type(self.layer) is not int or not 0 <= self.layer <= MAX_LAYER:
            raise StoreFormatError(f"hidden layer must be an integer in [0, {MAX_LAYER}], not {self.layer!r}")
        if self.dtype not in HIDDEN_DTYPES:
            raise StoreFormatError(
                f"hidden dtype must be one of {', '.join(HIDDEN_DTYPES)}, not {self.dtype!r}"
            )
        if type(self.positions) not in (int, float) or not 0 < self.positions <= 1:
            raise StoreFormatError(f"a share of positions must be in (0, 1], not {self.positions!r}")
        if type(self.above) not in (int, float) or not 0 <= self.above < self.positions:
            raise StoreFormatError(
                f"a share that is left out must be in [0, {self.positions}), not {self.above!r}"
            )
        object.__setattr__(self, "positions", float(self.positions))
        object.__setattr__(self, "above", float(self.above))
        check_int(self.seed, 0, 0 if self.whole else MAX_SEED, "seed of the share of positions")

    @property
    def kind(self) -> str:
        """The name that `CacheReader.find` takes: "hidden.L20" for layer 20."""
        return f"hidden.L{self.layer}"

    @property
    def whole(self) -> bool:
        """Whether all positions are stored."""
        return self.share == 1

    @property
    def share(self) -> float:
        """Which part of the positions is stored."""
        return self.positions - self.above

    def to_json(self) -> dict[str, Any]:
        """Optional fields are left out when unset, as those of `LogitsSpec`."""
        share = {} if self.whole else {"positions": self.positions}
        more = {name: value for name, value in (("seed", self.seed), ("above", self.above)) if value}
        return {"kind": "hidden", "layer": self.layer, "dtype": self.dtype, **share, **more}


@dataclass(frozen=True)
class LseSpec:
    """logsumexp(logits / temperature) of each row over the whole vocabulary.

    With it the head's probabilities at that temperature T are known: p_T(j) = exp(logit_j / T - lse_T). T = 1
    is in every logits group already.

    Args:
        temperature: T, with at most 3 decimals, other than 1.

    Raises:
        StoreFormatError: it is out of its range.

    Example:
        LseSpec(2.0)
    """

    temperature: float

    def __post_init__(self) -> None:
        value = self.temperature
        known = type(value) in (int, float) and MIN_TEMPERATURE <= value <= MAX_TEMPERATURE
        if not known or value == 1 or value != round(value, 3):
            raise StoreFormatError(
                f"a temperature is a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g} with at most 3 "
                f"decimals, other than 1 (which every distribution has), not {str(value)[:80]}"
            )
        object.__setattr__(self, "temperature", float(value))

    @property
    def kind(self) -> str:
        """The name that `CacheReader.find` takes: "lse.T2" for temperature 2."""
        return f"lse.T{self.temperature:g}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `group_spec_from_json` reads it."""
        return {"kind": "lse", "temperature": self.temperature}


GroupSpec = LogitsSpec | HiddenSpec | LseSpec


def group_id(spec: GroupSpec) -> str:
    """`<kind>-<8 hex>`, a name for the group's directories."""
    return f"{spec.kind}-{digest(canonical_json(spec.to_json()), 8)}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised sequence, the unit of identity. tokens: int32 [T]; loss_mask: bool [T].

    documents: keys of the documents that it is cut from, the one that it begins in first; no part of the
    identity, and empty where they are not known.
    """

    tokens: Array
    loss_mask: Array
    documents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("tokens", self.tokens, np.int32, (len(self.tokens),))
        _check("loss_mask", self.loss_mask, np.bool_, self.tokens.shape)
        if not 1 <= len(self.tokens) <= MAX_TOKENS or int(self.tokens.min()) < 0:
            raise ValueError("a sample needs at least one token, and token ids are not negative")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def id(self) -> str:
        """32 hex digits: a hash of the token ids and the mask."""
        tokens = self.tokens.astype("<i4", copy=False).tobytes()
        mask = self.loss_mask.astype(np.uint8).tobytes()
        return digest([b"distily-cache sample v1\0", len(self).to_bytes(8, "little"), tokens, mask])


def document_key(content: str | list[dict[str, str]]) -> str:
    """16 hex digits that name a document by its content: a text, or the messages of a chat."""
    if isinstance(content, str):
        return digest([b"distily-cache text v1\0", content.encode("utf-8", "surrogatepass")], 16)
    return digest([b"distily-cache chat v1\0", canonical_json(content)], 16)


def joined(documents: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """All keys, each once, in the order in which they come."""
    return tuple(dict.fromkeys(key for keys in documents for key in keys))


@dataclass(frozen=True, eq=False)
class LogitsFeatures:
    """The teacher's sparse distribution over one sample; ragged rows one after the other (CSR).

    counts: uint16 [T], head size of each row, >= 1. ids: uint32 [nnz], by descending logit in each row.
    logits: float32 [nnz], raw. lse: float32 [T], logsumexp of the raw logits over all of V.
    label_logprob: float32 [T], log p(tokens[t+1]) in nats; NaN at the last position, which has no label, and
    where a partial group does not know it.
    entropy: float32 [T], nats, of the full distribution; NaN in a partial group.
    tail_ids: int32 [T, M], draws from outside the head, ascending in each row, repeats included; a row whose
    tail has no mass holds NO_DRAW only. None when nothing is drawn.
    """

    counts: Array
    ids: Array
    logits: Array
    lse: Array
    label_logprob: Array
    entropy: Array
    tail_ids: Array | None = None

    def check(self, length: int) -> None:
        """ValueError unless shapes and dtypes are as documented for a sample of `length` positions."""
        _check("counts", self.counts, np.uint16, (length,))
        nnz = int(self.counts.sum(dtype=np.int64))
        _check("ids", self.ids, np.uint32, (nnz,))
        _check("logits", self.logits, np.float32, (nnz,))
        for name in ("lse", "label_logprob", "entropy"):
            _check(name, getattr(self, name), np.float32, (length,))
        if self.tail_ids is not None:
            _check("tail_ids", self.tail_ids, np.int32, (length, self.tail_ids.shape[-1]))


@dataclass(frozen=True, eq=False)
class HiddenFeatures:
    """One layer's hidden states of one sample, as stored.

    values [T, D]: uint16 (bf16 bits), int8, uint8 (fp8 e4m3fn bits) or float32, as `dtype` says; for int4
    and int2 uint8 [T, W], rows of bytes (featurestore.format.states.rotated); hidden_size then says D.
    For klt4 and klt6 likewise, in `basis` (featurestore.format.states.transform).
    scale: float32 [T] for int8 and fp8 (the value is stored * scale), else None. squared_error, squared_norm:
    float32 [T], per row the sums over D of (stored - exact)^2 and exact^2, known to the capture alone: only
    their sums over a task are kept, and what a reader gives has None.
    positions: int32 [n], ascending, of a share of the positions: where in the sample the n rows of the other
    fields, of T positions otherwise, stand. None: at all positions.
    """

    values: Array
    scale: Array | None
    dtype: str
    squared_error: Array | None = None
    squared_norm: Array | None = None
    hidden_size: int | None = None
    positions: Array | None = None
    basis: Basis | None = None

    def at(self, positions: Array) -> HiddenFeatures:
        """The rows of these positions, which are there."""
        rows = positions if self.positions is None else np.searchsorted(self.positions, positions)
        arrays = {name: getattr(self, name) for name in ("values", "scale", *HIDDEN_STATS)}
        cut: dict[str, Any] = {n: None if array is None else array[rows] for n, array in arrays.items()}
        return dataclasses.replace(self, positions=positions, **cut)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The hidden states as float32 [T, D], or [n, D] at `positions`."""
        return decode_hidden(self.values, self.scale, self.dtype, self.hidden_size, self.basis)

    def check(self, length: int, hidden_size: int) -> None:
        """ValueError unless shapes and dtypes are as documented for `length` positions."""
        if self.dtype not in HIDDEN_DTYPES:
            raise ValueError(f"unknown hidden dtype {self.dtype!r}")
        if self.positions is not None:
            _check("positions", self.positions, np.int32, (len(self.positions),))
            if not are_positions(self.positions, length):
                raise ValueError(f"positions must ascend, from 0 to at most {length - 1}")
            length = len(self.positions)
        stored, scaled = HIDDEN_DTYPES[self.dtype]
        _check("values", self.values, stored, (length, hidden_width(self.dtype, hidden_size)))
        if self.hidden_size != (hidden_size if self.dtype in ROTATED else None):
            raise ValueError(f"hidden_size must be {hidden_size} for int4 and int2, None for other types")
        if (self.dtype in TRANSFORMED) != (self.basis is not None):
            raise ValueError("klt4 and klt6 need a basis, other types have none")
        if self.basis is not None and (self.basis.dtype, self.basis.size) != (self.dtype, hidden_size):
            raise ValueError(f"the basis is not one of {self.dtype} for states of {hidden_size:,} numbers")
        if scaled != (self.scale is not None):
            raise ValueError(f"hidden states of dtype {self.dtype} {'need' if scaled else 'have no'} scale")
        if self.scale is not None:
            _check("scale", self.scale, np.float32, (length,))
        if (self.squared_error is None) != (self.squared_norm is None):
            raise ValueError("squared_error and squared_norm go together")
        for name in HIDDEN_STATS:
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), np.float32, (length,))


@dataclass(frozen=True, eq=False)
class LseFeatures:
    """logsumexp(logits / T) of one sample's rows at the temperature of its spec. lse: float32 [T], nats."""

    lse: Array

    def check(self, length: int) -> None:
        """ValueError unless there is one finite float32 for each of `length` positions."""
        _check("lse", self.lse, np.float32, (length,))
        if not np.isfinite(self.lse).all():
            raise ValueError("lse must be finite")


GroupFeatures = LogitsFeatures | HiddenFeatures | LseFeatures


def are_positions(positions: Array, length: int) -> bool:
    """Whether these ascend and are positions of a sample of `length`."""
    ascending = bool((positions[1:] > positions[:-1]).all())
    return ascending and (not len(positions) or (positions[0] >= 0 and positions[-1] < length))


def _check(name: str, array: Array, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, not {found}")
