"""Which arrays a column group consists of, and how features of samples become those arrays.

R rows (positions of all samples of a task), S samples, N head entries of all rows, M tail draws of a row, U
distinct token ids of a task, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.codec import (
    HIDDEN_DTYPES,
    LSE_STEPS,
    ODDS_STEPS,
    ROW_STEPS,
    STEPS_PER_NAT,
    encode_entropy,
    encode_head,
    encode_labels,
    encode_rows,
    head_mass,
    row_starts,
)
from featurestore.format.plan import Task
from featurestore.format.schema import (
    NO_DRAW,
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
    TeacherIdentity,
)

Array = npt.NDArray[Any]
Stats = dict[str, int | float]

HIDDEN_ROWS_PER_CHUNK = 256
VALUES_PER_CHUNK = 8_192
ENTRIES_PER_CHUNK = 16_384
LOGICAL_DTYPES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "f32": "float32"}

# What a commit record adds up over the rows of a logits group, for `info` (see docs/FORMAT.md).
# entries and distinct_ids are sizes of arrays.
LOGITS_STATS = ("entries", "distinct_ids", "labels", "head_mass", "label_logprob", "entropy")
# Of a hidden group whose capture measured them: sums over all elements of (stored - exact)^2 and exact^2.
HIDDEN_STATS = ("squared_error", "squared_norm")


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of a group: its shape, numpy dtype, rows per inner chunk, compression, attributes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    compressed: bool
    attributes: Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The sizes that the shapes of a group's arrays follow from."""

    rows: int
    samples: int
    entries: int
    distinct_ids: int
    vocab_size: int
    hidden_size: int

    @classmethod
    def of(cls, task: Task, stats: Stats, identity: TeacherIdentity) -> Extent:
        """The sizes of a task's group, of which `stats` were committed."""
        return cls(
            rows=task.rows,
            samples=len(task.lengths),
            entries=int(stats.get("entries", 0)),
            distinct_ids=int(stats.get("distinct_ids", 0)),
            vocab_size=identity.vocab_size,
            hidden_size=identity.hidden_size,
        )


def group_files(spec: GroupSpec) -> list[str]:
    """Every file of a group, relative to its directory: metadata, and one shard per array."""
    files = ["zarr.json"]
    for name, layout in layouts(
        spec, Extent(rows=1, samples=1, entries=1, distinct_ids=1, vocab_size=1, hidden_size=1)
    ).items():
        files += [f"{name}/zarr.json", f"{name}/{shard_key(layout)}"]
    return files


def shard_key(layout: ArrayLayout) -> str:
    """Where the only shard of an array lies: c/0 or c/0/0."""
    return "/".join(["c", *("0" for _ in layout.shape)])


def layouts(spec: GroupSpec, extent: Extent) -> dict[str, ArrayLayout]:
    """The arrays of a group with their shapes, dtypes and chunks."""
    rows = (extent.rows,)
    if isinstance(spec, LogitsSpec):
        return _logits_layouts(spec, extent)
    if isinstance(spec, LseSpec):
        return {"lse": _flat(rows, np.int32, attributes={"steps_per_nat": LSE_STEPS})}
    stored, scaled = HIDDEN_DTYPES[spec.dtype]
    values = ArrayLayout(
        shape=(extent.rows, extent.hidden_size),
        dtype=np.dtype(stored),
        chunk_rows=HIDDEN_ROWS_PER_CHUNK,
        compressed=False,
        attributes={"logical_dtype": LOGICAL_DTYPES[spec.dtype]},
    )
    return {"values": values, "scale": _flat(rows, np.float32)} if scaled else {"values": values}


def _logits_layouts(spec: LogitsSpec, extent: Extent) -> dict[str, ArrayLayout]:
    rows, entries = (extent.rows,), (extent.entries,)
    index = _unsigned(extent.distinct_ids)
    in_rows = {"steps_per_nat": ROW_STEPS}
    arrays = {
        "vocabulary": _flat((extent.distinct_ids,), _unsigned(extent.vocab_size)),
        "head_count": _flat(rows, np.uint8 if spec.top_k < 2**8 else np.uint16),
        "head_index": _flat(entries, index, ENTRIES_PER_CHUNK),
        "head_gaps": _flat(entries, np.uint16, ENTRIES_PER_CHUNK, {"steps_per_nat": STEPS_PER_NAT}),
        "head_odds": _flat(rows, np.int16, attributes={"steps_per_nat": ODDS_STEPS}),
        "lse": _flat(rows, np.int32, attributes=in_rows),
        "label_logprob": _flat(rows, np.uint32, attributes=in_rows),
        "entropy": _flat(rows, np.uint16, attributes=in_rows),
        "sample_offsets": _flat((extent.samples + 1,), np.int64),
    }
    if spec.tail:
        chunk = max(1, ENTRIES_PER_CHUNK // spec.tail)
        arrays["tail_index"] = _flat((extent.rows, spec.tail), index, chunk)
    return arrays


def _unsigned(count: int) -> type[np.generic]:
    """The smaller of uint16 and uint32 that counts 0 .. count - 1."""
    return np.uint16 if count <= 2**16 else np.uint32


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
        arrays, stats = _pack_logits([f for f in features if isinstance(f, LogitsFeatures)], vocab_size)
        arrays["head_count"] = arrays["head_count"].astype(np.uint8 if spec.top_k < 2**8 else np.uint16)
        return arrays, stats
    if isinstance(spec, LseSpec):
        lse = np.concatenate([f.lse for f in features if isinstance(f, LseFeatures)])
        return {"lse": encode_rows(lse, np.int32, LSE_STEPS)}, {}
    hidden = [f for f in features if isinstance(f, HiddenFeatures)]
    arrays = {"values": np.concatenate([f.values for f in hidden])}
    if hidden[0].scale is not None:
        arrays["scale"] = np.concatenate([f.scale for f in hidden if f.scale is not None])
    return arrays, _hidden_stats(hidden)


def _hidden_stats(features: Sequence[HiddenFeatures]) -> Stats:
    """HIDDEN_STATS over all rows; empty unless every sample has them and all are finite."""
    sums: Stats = {}
    for name in HIDDEN_STATS:
        rows = [getattr(f, name) for f in features]
        if any(row is None for row in rows):
            return {}
        sums[name] = float(np.concatenate(rows).sum(dtype=np.float64))
    return sums if all(map(math.isfinite, sums.values())) else {}


def _flat(
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    chunk: int = VALUES_PER_CHUNK,
    attributes: Mapping[str, str | int] | None = None,
) -> ArrayLayout:
    return ArrayLayout(
        shape=shape, dtype=np.dtype(dtype), chunk_rows=chunk, compressed=True, attributes=attributes or {}
    )


def _check(spec: GroupSpec, one: GroupFeatures, length: int, vocab_size: int, hidden_size: int) -> None:
    if isinstance(spec, LogitsSpec):
        if not isinstance(one, LogitsFeatures):
            raise ValueError(f"expected LogitsFeatures, not {type(one).__name__}")
        one.check(length)
        _check_logits(spec, one, vocab_size)
        return
    if isinstance(spec, LseSpec):
        if not isinstance(one, LseFeatures):
            raise ValueError(f"expected LseFeatures, not {type(one).__name__}")
        one.check(length)
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
    if not np.isfinite(one.lse).all():
        raise ValueError("lse must be finite")
    _check_known(spec, one)
    if (one.logits[row_starts(one.counts)[:-1]] > one.lse + 0.01).any():
        raise ValueError("a top logit exceeds the row's lse: these are not raw logits of one distribution")
    if (0 if one.tail_ids is None else one.tail_ids.shape[1]) != spec.tail:
        raise ValueError(f"{spec.tail} tail draws for each row are needed")
    if one.tail_ids is not None:
        _check_tail(one, one.tail_ids, vocab_size)


def _check_known(spec: LogitsSpec, one: LogitsFeatures) -> None:
    """NaN is allowed in the rows of partial groups alone, and for the label that the last row has not."""
    labels = one.label_logprob[:-1]
    if spec.partial:
        if not np.isnan(one.entropy).all():
            raise ValueError("the entropy of a partial group is unknown and must be NaN")
        labels = labels[~np.isnan(labels)]
    elif not np.isfinite(one.entropy).all():
        raise ValueError("entropy must be finite")
    if not np.isfinite(labels).all() or not np.isnan(one.label_logprob[-1]):
        raise ValueError("label_logprob must be finite, and NaN at the last position, which has no label")


def _check_tail(one: LogitsFeatures, draws: Array, vocab_size: int) -> None:
    if int(draws.min()) < NO_DRAW or int(draws.max()) >= vocab_size or (np.diff(draws, axis=1) < 0).any():
        raise ValueError(f"tail ids must ascend in each row and be below the vocabulary size {vocab_size}")
    if ((draws == NO_DRAW).any(axis=1) != (draws == NO_DRAW).all(axis=1)).any():
        raise ValueError("a row has all of its tail draws or none")
    row = np.arange(len(one.counts), dtype=np.int64) * vocab_size
    drawn = (draws + row[:, None])[draws != NO_DRAW]
    if np.isin(drawn, one.ids + np.repeat(row, one.counts)).any():
        raise ValueError("a tail draw is inside its row's head")


def _pack_logits(features: Sequence[LogitsFeatures], vocab_size: int) -> tuple[dict[str, Array], Stats]:
    counts, ids, logits, lse, label_logprob, entropy = (
        np.concatenate([getattr(f, name) for f in features])
        for name in ("counts", "ids", "logits", "lse", "label_logprob", "entropy")
    )
    tails = [f.tail_ids for f in features if f.tail_ids is not None]
    # A row without draws repeats its own top id, which no draw can be.
    tops = ids[row_starts(counts)[:-1]].astype(np.int64)
    draws = np.concatenate(tails) if tails else np.zeros((len(counts), 0), dtype=np.int64)
    draws = np.where(draws == NO_DRAW, tops[:, None], draws)
    vocabulary, place = _vocabulary(np.concatenate([ids, draws.ravel()]), vocab_size)
    index = _unsigned(len(vocabulary))
    gaps, odds = encode_head(counts, logits, lse)
    offsets = np.zeros(len(features) + 1, dtype=np.int64)
    np.cumsum([len(f.ids) for f in features], out=offsets[1:])
    arrays = {
        "vocabulary": vocabulary.astype(_unsigned(vocab_size)),
        "head_count": counts,
        "head_index": place[ids].astype(index),
        "head_gaps": gaps,
        "head_odds": odds,
        "lse": encode_rows(lse, np.int32),
        "label_logprob": encode_labels(label_logprob),
        "entropy": encode_entropy(entropy),
        "sample_offsets": offsets,
    }
    if tails:
        arrays["tail_index"] = np.diff(np.sort(place[draws], axis=1), axis=1, prepend=0).astype(index)
    labels = label_logprob[~np.isnan(label_logprob)].astype(np.float64)
    stats: Stats = {
        "entries": len(logits),
        "distinct_ids": len(vocabulary),
        "labels": len(labels),
        "head_mass": float(head_mass(counts, logits, lse).sum()),
        "label_logprob": float(labels.sum()),
        "entropy": float(np.nansum(entropy, dtype=np.float64)),
    }
    return arrays, stats


def _vocabulary(ids: Array, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(the distinct ids, frequent ones first [U], where each id stands in it [V], 0 for the others).

    Indexes into this list are small numbers mostly: their high bytes compress, those of ids do not. Ids whose
    frequencies are within a factor of sqrt(2) stay in ascending order, so that the list compresses too.
    """
    count = np.bincount(ids, minlength=vocab_size)
    used = np.flatnonzero(count)
    vocabulary = used[np.argsort(-np.floor(2 * np.log2(count[used])), kind="stable")]
    place = np.zeros(vocab_size, dtype=np.int64)
    place[vocabulary] = np.arange(len(vocabulary))
    return vocabulary, place
