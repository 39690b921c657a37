"""Number codecs: the head of a distribution, and hidden states. Pure numpy, no loop over rows.

R rows, nnz head entries of all rows together, D hidden size.

Head logits. Each row keeps its top logit exactly (float32). The others are drops below it, quantised to
steps of 1/32 nat and stored as the differences between neighbours in rank. The *cumulative* drop is what
is rounded, so the error of a logit is at most 1/64 nat (plus one rounding to float32) at every rank, and
does not grow along the row. A drop above 65,535 steps (2,047.97 nats) is stored as that: its probability
is zero in float64 either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STEPS_PER_NAT = 32
MAX_DROP = 65_535
LOGIT_ERROR = 1 / (2 * STEPS_PER_NAT)

# dtype name -> (numpy dtype on disk, whether there is a scale per position)
HIDDEN_DTYPES: dict[str, tuple[type[np.generic], bool]] = {
    "bf16": (np.uint16, False),
    "int8": (np.int8, True),
    "fp8": (np.uint8, True),
    "f32": (np.float32, False),
}


def row_starts(counts: Array) -> npt.NDArray[np.int64]:
    """int64 [R + 1]: where each row of `counts` entries starts, and the end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def encode_head(counts: Array, logits: Array) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """counts [R] (all >= 1) and logits float32 [nnz], descending in each row -> gaps uint16 [nnz], top [R].

    ValueError when a logit is NaN or +inf, a top logit is -inf, or a row does not descend.
    """
    starts = row_starts(counts)[:-1]
    top = logits[starts].astype(np.float32)
    if not np.isfinite(top).all() or np.isnan(logits).any():
        raise ValueError("head logits must not be NaN, and the top of each row must be finite")
    drop = np.repeat(top.astype(np.float64), counts) - logits
    steps = np.minimum(np.rint(drop * STEPS_PER_NAT), MAX_DROP)
    gaps = np.diff(steps, prepend=0.0)
    gaps[starts] = 0.0
    if (logits[1:] > logits[:-1])[_inside(starts, len(logits))].any():
        raise ValueError("head logits must descend inside each row")
    return gaps.astype(np.uint16), top


def decode_head(counts: Array, gaps: Array, top: Array) -> npt.NDArray[np.float32]:
    """The inverse of `encode_head`, within 1/64 nat: logits float32 [nnz]."""
    total = np.cumsum(gaps, dtype=np.int64)
    starts = row_starts(counts)[:-1]
    # The subtraction of integers is exact, so each row's top comes back to the last bit. A row's first
    # gap is 0 by definition and cancels.
    drop = (total - np.repeat(total[starts], counts)) / STEPS_PER_NAT
    return (np.repeat(top.astype(np.float64), counts) - drop).astype(np.float32)


def head_mass(counts: Array, logits: Array, lse: Array) -> npt.NDArray[np.float64]:
    """float64 [R]: the probability that each row's head holds, given its logsumexp."""
    p = np.exp(logits.astype(np.float64) - np.repeat(lse.astype(np.float64), counts))
    return np.add.reduceat(p, row_starts(counts)[:-1])


def narrow_mask(counts: Array, logits: Array, lse: Array, top_k: int, top_p: float | None) -> Array:
    """bool [nnz]: entries of the smaller head that (top_k, top_p) would have kept.

    An entry stays when its rank is below top_k and the mass of the ranks above it is below top_p.
    """
    starts = row_starts(counts)[:-1]
    rank = np.arange(len(logits)) - np.repeat(starts, counts)
    keep = rank < top_k
    if top_p is not None:
        p = np.exp(logits.astype(np.float64) - np.repeat(lse.astype(np.float64), counts))
        before = np.cumsum(p) - p
        keep &= (before - np.repeat(before[starts], counts)) < top_p
    return keep


def decode_hidden(values: Array, scale: Array | None, dtype: str) -> npt.NDArray[np.float32]:
    """Stored hidden states [T, D] (and scale float32 [T]) -> float32 [T, D]. bf16 and f32 are exact."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "f32":
        return values.astype(np.float32)
    plain = FP8_E4M3FN[values] if dtype == "fp8" else values.astype(np.float32)
    assert scale is not None
    return plain * scale[:, None]


def _inside(starts: Array, size: int) -> npt.NDArray[np.bool_]:
    """bool [nnz - 1]: whether entry i and i + 1 belong to the same row."""
    same = np.ones(size, dtype=np.bool_)
    same[starts] = False
    return same[1:]


def _fp8_table() -> npt.NDArray[np.float32]:
    """All 256 values of OCP fp8 e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    value = np.where((bits & 127) == 127, np.nan, value)
    return np.where(bits >= 128, -value, value).astype(np.float32)


FP8_E4M3FN = _fp8_table()
