"""Which arrays a column group consists of, and how features of samples become those arrays.

R rows (positions of all samples of a task), S samples, N head entries of all rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.codec import HIDDEN_DTYPES, STEPS_PER_NAT, encode_head, head_mass, row_starts
from featurestore.schema import GroupFeatures, GroupSpec, HiddenFeatures, LogitsFeatures, LogitsSpec

Array = npt.NDArray[Any]
Stats = dict[str, int | float]

HIDDEN_ROWS_PER_CHUNK = 256
VALUES_PER_CHUNK = 8_192
ENTRIES_PER_CHUNK = 16_384
LOGICAL_DTYPES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "f32": "float32"}

# What a commit record adds up over the rows of a logits group, for `info` (see docs/FORMAT.md).
LOGITS_STATS = ("entries", "labels", "head_mass", "label_logprob", "entropy")


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a group: its shape, numpy dtype, rows per inner chunk, compression, attributes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    compressed: bool
    attributes: Mapping[str, str | int]


@dataclass(frozen=True)
class Extent:
    """The sizes that the shapes of a group's arrays follow from."""

    rows: int
    samples: int
    entries: int
    vocab_size: int
    hidden_size: int


def group_files(spec: GroupSpec) -> list[str]:
    """Every file of a group, relative to its directory: metadata, and one shard per array."""
    files = ["zarr.json"]
    for name, layout in layouts(spec, Extent(1, 1, 1, 1, 1)).items():
        files += [f"{name}/zarr.json", f"{name}/{shard_key(layout)}"]
    return files


def shard_key(layout: ArrayLayout) -> str:
    """Where the only shard of an array lies: c/0 or c/0/0."""
    return "/".join(["c", *("0" for _ in layout.shape)])


def layouts(spec: GroupSpec, extent: Extent) -> dict[str, ArrayLayout]:
    """The arrays of a group with their shapes, dtypes and chunks."""
    rows, entries = (extent.rows,), (extent.entries,)
    if isinstance(spec, LogitsSpec):
        id_dtype = np.uint16 if extent.vocab_size <= 2**16 else np.uint32
        return {
            "head_count": _flat(rows, np.uint16),
            "head_ids": _flat(entries, id_dtype, ENTRIES_PER_CHUNK),
            "head_gaps": _flat(entries, np.uint16, ENTRIES_PER_CHUNK, {"steps_per_nat": STEPS_PER_NAT}),
            "top_logit": _flat(rows, np.float32),
            "lse": _flat(rows, np.float32),
            "label_logprob": _flat(rows, np.float32),
            "entropy": _flat(rows, np.float32),
            "sample_offsets": _flat((extent.samples + 1,), np.int64),
        }
    stored, scaled = HIDDEN_DTYPES[spec.dtype]
    values = ArrayLayout(
        shape=(extent.rows, extent.hidden_size),
        dtype=np.dtype(stored),
        chunk_rows=HIDDEN_ROWS_PER_CHUNK,
        compressed=False,
        attributes={"logical_dtype": LOGICAL_DTYPES[spec.dtype]},
    )
    return {"values": values, "scale": _flat(rows, np.float32)} if scaled else {"values": values}


def pack(
    spec: GroupSpec,
    features: Sequence[GroupFeatures],
    lengths: Sequence[int],
    vocab_size: int,
    hidden_size: int,
) -> tuple[dict[str, Array], Stats]:
    """Check the features of a task's samples, in order, and join them into the arrays of the group.

    ValueError, naming the sample, for anything that the documented shapes, dtypes and ranges exclude.
    """
    if len(features) != len(lengths):
        raise ValueError(f"{spec.kind}: features of {len(features)} samples for {len(lengths)} samples")
    for i, (one, length) in enumerate(zip(features, lengths, strict=True)):
        try:
            _check(spec, one, length, vocab_size, hidden_size)
        except ValueError as error:
            raise ValueError(f"{spec.kind}, sample {i} of the task: {error}") from None
    if isinstance(spec, LogitsSpec):
        return _pack_logits([f for f in features if isinstance(f, LogitsFeatures)], vocab_size)
    hidden = [f for f in features if isinstance(f, HiddenFeatures)]
    arrays = {"values": np.concatenate([f.values for f in hidden])}
    if hidden[0].scale is not None:
        arrays["scale"] = np.concatenate([f.scale for f in hidden if f.scale is not None])
    return arrays, {}


def _flat(
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    chunk: int = VALUES_PER_CHUNK,
    attributes: Mapping[str, str | int] | None = None,
) -> ArrayLayout:
    return ArrayLayout(shape, np.dtype(dtype), chunk, True, attributes or {})


def _check(spec: GroupSpec, one: GroupFeatures, length: int, vocab_size: int, hidden_size: int) -> None:
    if isinstance(spec, LogitsSpec):
        if not isinstance(one, LogitsFeatures):
            raise ValueError(f"expected LogitsFeatures, not {type(one).__name__}")
        one.check(length)
        _check_logits(spec, one, vocab_size)
        return
    if not isinstance(one, HiddenFeatures) or one.dtype != spec.dtype:
        raise ValueError(f"expected HiddenFeatures of dtype {spec.dtype}")
    one.check(length, hidden_size)


def _check_logits(spec: LogitsSpec, one: LogitsFeatures, vocab_size: int) -> None:
    widest = min(spec.top_k, vocab_size)
    if int(one.counts.min()) < 1 or int(one.counts.max()) > widest:
        raise ValueError(f"head sizes must be in [1, {widest}]")
    if int(one.ids.max()) >= vocab_size:
        raise ValueError(f"head ids must be below the vocabulary size {vocab_size}")
    if not (np.isfinite(one.lse).all() and np.isfinite(one.entropy).all()):
        raise ValueError("lse and entropy must be finite")
    if not np.isfinite(one.label_logprob[:-1]).all() or not np.isnan(one.label_logprob[-1]):
        raise ValueError("label_logprob must be finite, and NaN at the last position, which has no label")
    if (one.logits[row_starts(one.counts)[:-1]] > one.lse + 0.01).any():
        raise ValueError("a top logit exceeds the row's lse: these are not raw logits of one distribution")


def _pack_logits(features: Sequence[LogitsFeatures], vocab_size: int) -> tuple[dict[str, Array], Stats]:
    counts = np.concatenate([f.counts for f in features])
    logits = np.concatenate([f.logits for f in features])
    lse = np.concatenate([f.lse for f in features])
    label_logprob = np.concatenate([f.label_logprob for f in features])
    entropy = np.concatenate([f.entropy for f in features])
    gaps, top = encode_head(counts, logits)
    offsets = np.zeros(len(features) + 1, dtype=np.int64)
    np.cumsum([len(f.ids) for f in features], out=offsets[1:])
    id_dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    arrays = {
        "head_count": counts,
        "head_ids": np.concatenate([f.ids for f in features]).astype(id_dtype),
        "head_gaps": gaps,
        "top_logit": top,
        "lse": lse,
        "label_logprob": label_logprob,
        "entropy": entropy,
        "sample_offsets": offsets,
    }
    labels = label_logprob[~np.isnan(label_logprob)].astype(np.float64)
    stats: Stats = {
        "entries": len(logits),
        "labels": len(labels),
        "head_mass": float(head_mass(counts, logits, lse).sum()),
        "label_logprob": float(labels.sum()),
        "entropy": float(entropy.sum(dtype=np.float64)),
    }
    return arrays, stats
