"""Number codecs: the head of a distribution, row numbers, hidden states. Pure numpy, no loop over rows.

R rows, nnz head entries of all rows together, D hidden size.

Head. A row is stored as the *shape* of its head (how far each logit lies below the top, in steps of 1/16 nat,
as differences between neighbours in rank) and as the log-odds of its *mass*, log(inside / outside), in steps
of 1/128. Decoding normalises the shape to the mass, so that head and tail of every row sum to exactly one.
The *cumulative* drop is what is rounded, to within 1/32 nat at every rank; normalising moves a row by at most
as much again, and the rounded log-odds its head mass by at most a factor of exp(tail / 256) and its tail mass
by exp(head / 256). So a log-probability is off by at most 1/16 + 1/256 nat (plus roundings of float32),
typically 0.01. A drop above 65,535 steps (4,095.9 nats) is stored as that: its probability is zero in float64
either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.states.bfloat16 import from_bf16
from featurestore.format.states.rotated import ROTATED, RotatedLayout, decode_rotated
from featurestore.format.states.transform import TRANSFORMED, Basis, decode_transformed, transformed_bytes

Array = npt.NDArray[Any]

STEPS_PER_NAT = 16
MAX_DROP = 65_535
ODDS_STEPS = 128
MAX_ODDS = 32_766
# The head holds all the mass.
CLOSED = 32_767
LOGPROB_ERROR = 1 / STEPS_PER_NAT + 1 / (2 * ODDS_STEPS)
# lse, label log-probability and entropy: within 1/128 nat.
ROW_STEPS = 64
ROW_ERROR = 1 / (2 * ROW_STEPS)
# logsumexp at a temperature of its own: within 1/512 nat.
LSE_STEPS = 256
LSE_ERROR = 1 / (2 * LSE_STEPS)
NO_LABEL = 2**32 - 1
# Of a partial group: the entropy is not known. 1,024 nats are more than any vocabulary allows.
NO_ENTROPY = 2**16 - 1

# dtype name -> (numpy dtype on disk, whether there is a scale per position). Rows of int4, int2,
# klt4 and klt6 are bytes.
HIDDEN_DTYPES: dict[str, tuple[type[np.generic], bool]] = {
    "bf16": (np.uint16, False),
    "int8": (np.int8, True),
    "fp8": (np.uint8, True),
    "int4": (np.uint8, False),
    "int2": (np.uint8, False),
    "klt4": (np.uint8, False),
    "klt6": (np.uint8, False),
    "f32": (np.float32, False),
}


def row_starts(counts: Array) -> npt.NDArray[np.int64]:
    """int64 [R + 1]: where each row of `counts` entries starts, and the end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def encode_head(
    counts: Array, logits: Array, lse: Array
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int16]]:
    """counts [R] (all >= 1), logits float32 [nnz] descending in each row, lse [R] -> gaps [nnz], odds [R].

    ValueError when a logit is NaN or +inf, a top logit is -inf, or a row does not descend.
    """
    starts = row_starts(counts)[:-1]
    top = logits[starts].astype(np.float64)
    if not np.isfinite(top).all() or np.isnan(logits).any():
        raise ValueError("head logits must not be NaN, and the top of each row must be finite")
    if (logits[1:] > logits[:-1])[_inside(starts, len(logits))].any():
        raise ValueError("head logits must descend inside each row")
    # Each drop from the top is rounded, and only then are differences taken: rounded differences would add up
    # their errors with rank.
    drop = np.repeat(top, counts) - logits
    steps = np.minimum(np.rint(drop * STEPS_PER_NAT), MAX_DROP)
    gaps = np.diff(steps, prepend=0.0)
    gaps[starts] = 0.0
    return gaps.astype(np.uint16), encode_odds(head_mass(counts, logits, lse))


def encode_odds(mass: Array) -> npt.NDArray[np.int16]:
    """float64 [R] mass of each head -> int16 [R], log(inside / outside) in ODDS_STEPS; CLOSED from one on."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.rint((np.log(mass) - np.log1p(-mass)) * ODDS_STEPS)
    # A mass of one, or above it by the rounding of lse.
    return np.where(mass >= 1, CLOSED, np.clip(odds, -MAX_ODDS, MAX_ODDS)).astype(np.int16)


def decode_head(counts: Array, gaps: Array, odds: Array, lse: Array) -> npt.NDArray[np.float32]:
    """The inverse of `encode_head`: logits float32 [nnz], within LOGPROB_ERROR relative to `lse`."""
    starts = row_starts(counts)[:-1]
    total = np.cumsum(gaps, dtype=np.int64)
    # A row's first gap is 0 by definition and cancels.
    drop = (total - np.repeat(total[starts], counts)) / STEPS_PER_NAT
    # One shift for each row makes the exponentials of its head sum to the stored mass.
    log_mass = np.where(odds == CLOSED, 0.0, -np.logaddexp(0.0, odds / -ODDS_STEPS))
    shift = lse + log_mass - np.log(np.add.reduceat(np.exp(-drop), starts))
    return (np.repeat(shift, counts) - drop).astype(np.float32)


def encode_rows(values: Array, dtype: npt.DTypeLike, steps: int = ROW_STEPS) -> Array:
    """float [R] in nats -> integers [R] of `steps` per nat; ValueError when one does not fit the dtype."""
    codes = np.rint(values.astype(np.float64) * steps)
    limits = np.iinfo(np.dtype(dtype))
    if (codes < limits.min).any() or (codes > limits.max).any():
        raise ValueError(f"a number of a row is outside [{limits.min}, {limits.max}] / {steps} nats")
    return codes.astype(dtype)


def decode_rows(codes: Array, steps: int = ROW_STEPS) -> npt.NDArray[np.float32]:
    """The inverse of `encode_rows`, float32 [R], within half a step."""
    return (codes / steps).astype(np.float32)


def encode_labels(logprob: Array) -> npt.NDArray[np.uint32]:
    """float [R] log-probabilities (NaN: no label) -> uint32 [R], the negative in ROW_STEPS per nat."""
    missing = np.isnan(logprob)
    codes = encode_rows(np.maximum(-np.where(missing, 0.0, logprob), 0.0), np.uint32)
    return np.where(missing, np.uint32(NO_LABEL), codes)


def decode_labels(codes: Array) -> npt.NDArray[np.float32]:
    """The inverse of `encode_labels`, within ROW_ERROR."""
    return np.where(codes == NO_LABEL, np.float32(np.nan), -decode_rows(codes))


def encode_entropy(entropy: Array) -> npt.NDArray[np.uint16]:
    """float [R] in nats (NaN: unknown) -> uint16 [R] in ROW_STEPS per nat."""
    unknown = np.isnan(entropy)
    codes = encode_rows(np.maximum(np.where(unknown, 0.0, entropy), 0.0), np.uint16)
    return np.where(unknown, np.uint16(NO_ENTROPY), codes)


def decode_entropy(codes: Array) -> npt.NDArray[np.float32]:
    """The inverse of `encode_entropy`, within ROW_ERROR."""
    return np.where(codes == NO_ENTROPY, np.float32(np.nan), decode_rows(codes))


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
        # The mass of the ranks above each entry: a running sum over all rows, less what each row began with.
        p = np.exp(logits.astype(np.float64) - np.repeat(lse.astype(np.float64), counts))
        before = np.cumsum(p) - p
        keep &= (before - np.repeat(before[starts], counts)) < top_p
    return keep


def hidden_width(dtype: str, hidden_size: int) -> int:
    """How many stored values a position has: D, or the bytes of a row of int4, int2, klt4 and klt6."""
    if dtype in TRANSFORMED:
        return transformed_bytes(dtype, hidden_size)
    return RotatedLayout(dtype, hidden_size).row_bytes if dtype in ROTATED else hidden_size


def decode_hidden(
    values: Array,
    scale: Array | None,
    dtype: str,
    hidden_size: int | None = None,
    basis: Basis | None = None,
) -> npt.NDArray[np.float32]:
    """Stored hidden states [T, D] (and scale float32 [T]) -> float32 [T, D]. bf16 and f32 are exact.

    For int4 and int2: rows of bytes [T, W], of states of `hidden_size` numbers; for klt4 and klt6 in `basis`.
    """
    if dtype == "bf16":
        return from_bf16(values)
    if dtype == "f32":
        return values.astype(np.float32)
    if dtype in TRANSFORMED:
        assert basis is not None
        return decode_transformed(values, basis)
    if dtype in ROTATED:
        assert hidden_size is not None
        return decode_rotated(values, dtype, hidden_size)
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
