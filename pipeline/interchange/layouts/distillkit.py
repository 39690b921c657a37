"""DistillKit's offline data sets: compressed (bytes per position) or plain (token_ids, top_values).

The layout, and where it was read: docs/exchange.md. R positions, k entries of each, B bytes of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distily.safety.parsing import MAX_YAML, parse_yaml, read_limited
from distily.text import one_line
from featurestore.format.states.bfloat16 import from_bf16
from pipeline.errors import RequestError
from pipeline.interchange.layouts.base import Document, flat, learned_tokens, nested, split_packed

Array = npt.NDArray[Any]

CONFIG_FILE = "compression_config.yaml"
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
_COMPRESSED = ["compressed_logprobs", "bytepacked_indices"]
_PLAIN = ["top_values", "token_ids"]


@dataclass(frozen=True)
class Bin:
    """The next `num_elements` residuals: a scale, then integers of `element_bits`."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a position's log-probabilities were made into bytes; the fields have DistillKit's names."""

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...]
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False  # of the encoder alone
    normalize_t: bool = False

    def __post_init__(self) -> None:
        dtypes = (self.exact_dtype, self.term_dtype, *(b.scale_dtype for b in self.residual_bins))
        sizes = (self.d, self.k, *(n for b in self.residual_bins for n in (b.element_bits, b.num_elements)))
        binned = sum(b.num_elements for b in self.residual_bins)
        if (
            not set(dtypes) <= set(_BYTES)
            or any(type(n) is not int or n < 1 for n in sizes)
            or any(b.element_bits > 62 for b in self.residual_bins)
            or not all(t in _SPECIAL or type(t) is int for t in self.polynomial_terms)
            or type(self.exact_k) is not int
            or not 0 <= self.exact_k <= self.k - binned
        ):
            raise ValueError("numbers or names that DistillKit does not allow")

    @property
    def index_bits(self) -> int:
        """Bits of a token id. DistillKit computes them in float32."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a position in (compressed_logprobs, bytepacked_indices)."""
        values = (
            self.exact_k * _BYTES[self.exact_dtype] + len(self.polynomial_terms) * _BYTES[self.term_dtype]
        )
        values += sum(
            _BYTES[b.scale_dtype] + -(-b.num_elements * b.element_bits // 8) for b in self.residual_bins
        )
        return values, -(-self.k * self.index_bits // 8)


def read_compression(path: Path) -> Compression:
    """A compression configuration from YAML or JSON; RequestError, naming --compression, when it is none."""
    try:
        value = dict(parse_yaml(read_limited(path, MAX_YAML).decode()))
        unknown = set(value) - {field.name for field in fields(Compression)}
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]}")
        bins = tuple(Bin(**one) for one in value.pop("residual_bins"))
        terms = tuple(value.pop("polynomial_terms", None) or ())
        return Compression(residual_bins=bins, polynomial_terms=terms, **value)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = one_line(error, None)
        raise RequestError(
            f"--compression {path}: no compression configuration of DistillKit: {why}"
        ) from error


class DistillKit:
    """Row r of a text describes the token at r + 1: vLLM's prompt log-probabilities without the first."""

    def __init__(self, columns: list[str], compression: Path | None) -> None:
        """`compression`: not needed for plain data sets. RequestError when the columns do not fit."""
        kind = next((kind for kind in (_COMPRESSED, _PLAIN) if set(kind) <= set(columns)), None)
        if kind is None or "input_ids" not in columns:
            legacy = "packed_indices" in columns
            why = (
                "its legacy logits have no known mass" if legacy else f"its columns are {', '.join(columns)}"
            )
            raise RequestError(
                f"--layout distillkit: needs input_ids and {' and '.join(_COMPRESSED)}, "
                f"or {' and '.join(_PLAIN)}; {why}"
            )
        self.columns = [c for c in ("input_ids", "labels", "attention_mask", *kind) if c in columns]
        self._compression = None
        if kind is _COMPRESSED:
            if compression is None:
                raise RequestError(
                    f"--compression: give the {CONFIG_FILE} of the data set; its bytes cannot be read without"
                )
            self._compression = read_compression(compression)

    def documents(self, row: Any) -> Iterator[Document]:
        tokens = flat(row, "input_ids")
        assert tokens is not None
        ids, logprobs = self._heads(row)
        missing = len(tokens) - len(ids)
        if missing < 0:
            raise RequestError(f"DATASET: {len(ids)} distributions for {len(tokens)} tokens")
        width = ids.shape[1] if len(ids) else 0
        whole = Document(
            tokens=tokens.astype(np.int64),
            learned=learned_tokens(row, tokens),
            counts=np.concatenate([np.full(len(ids), width), np.zeros(missing, np.int64)]).astype(np.int64),
            ids=ids.ravel(),
            logprobs=logprobs.ravel(),
        )
        yield from split_packed(whole, flat(row, "attention_mask"))

    def _heads(self, row: Any) -> tuple[Array, Array]:
        """ids int64 [R, k], logprobs float64 [R, k]."""
        if self._compression is None:
            values, ids = (_matrix(row, name) for name in _PLAIN)
            return ids.astype(np.int64), values.astype(np.float64)
        packed = [_matrix(row, name).astype(np.uint8) for name in _COMPRESSED]
        for name, data, wanted in zip(_COMPRESSED, packed, self._compression.row_bytes, strict=True):
            if len(data) and data.shape[1] != wanted:
                raise RequestError(
                    f"--compression: says {wanted} bytes of {name} per position, there are {data.shape[1]}"
                )
        if len(packed[0]) != len(packed[1]):
            raise RequestError("DATASET: other numbers of positions in its two columns")
        if not len(packed[0]):
            return np.zeros((0, 0), np.int64), np.zeros((0, 0))
        ids = unpack_bits(packed[1], self._compression.index_bits, self._compression.k)
        return ids, decode_logprobs(packed[0], self._compression)


def _matrix(row: Any, name: str) -> Array:
    lengths, values = nested(row, name)
    if len(set(lengths.tolist())) > 1:
        raise RequestError(f"DATASET: column {name} has positions of different lengths")
    return values.reshape(len(lengths), -1) if len(values) else np.zeros((0, 0))


def unpack_bits(data: Array, bits: int, count: int) -> Array:
    """uint8 [R, B] -> int64 [R, count]: integers of `bits`, highest bit first, without gaps."""
    taken = np.unpackbits(data, axis=1)[:, : bits * count].reshape(len(data), count, bits)
    return np.asarray(taken @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))


def decode_logprobs(data: Array, config: Compression) -> Array:
    """uint8 [R, B] -> float64 [R, k]: exact values, polynomial plus residuals, summed up if deltas."""
    exact, rest = _take(data, config.exact_k, config.exact_dtype)
    coefficients, rest = _take(rest, len(config.polynomial_terms), config.term_dtype)
    approximate = np.zeros((len(data), config.k - config.exact_k))
    done = 0
    for one in config.residual_bins:
        scale, rest = _take(rest, 1, one.scale_dtype)
        size = -(-one.num_elements * one.element_bits // 8)
        steps = unpack_bits(rest[:, :size], one.element_bits, one.num_elements)
        # One bit is a sign; more are offset by half of their range.
        steps = 2 * steps - 1 if one.element_bits == 1 else steps - (1 << (one.element_bits - 1))
        approximate[:, done : done + one.num_elements] = steps * scale
        done, rest = done + one.num_elements, rest[:, size:]
    count = approximate.shape[1]
    if config.polynomial_terms and count:
        t = np.linspace(0.0, 1.0, count) if config.normalize_t else np.arange(count, dtype=np.float64)
        powers = [_SPECIAL[term](t) if isinstance(term, str) else t**term for term in config.polynomial_terms]
        approximate += coefficients @ np.stack(powers)
    values = np.concatenate([exact, approximate], axis=1)
    return np.cumsum(values, axis=1) if config.delta_encoding else values


def _take(data: Array, count: int, dtype: str) -> tuple[Array, Array]:
    """(the first `count` little-endian numbers of each row as float64 [R, count], the bytes behind them)."""
    size = count * _BYTES[dtype]
    head = np.ascontiguousarray(data[:, :size])
    numbers = from_bf16(head.view("<u2")) if dtype == "bfloat16" else head.view(f"<f{_BYTES[dtype]}")
    return numbers.astype(np.float64), data[:, size:]
