"""Where the tail of a row is sampled: points that depend on the sample's tokens, the position and a seed
only.

M draws of a row are the inverse CDF, in order of token id, at u_j = frac(U + vdC(j)): U is uniform and comes
from a counter-based hash, vdC is the van der Corput sequence in base 2 (Niederreiter 1992, chapter 3). Every
single u_j is uniform, so sums over the draws are unbiased; together they are spread evenly, so the variance
is below that of independent draws. The first m of M draws are the draws of m, whatever the batch or the
engine.

T positions of a sample, R rows, M draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

Array = npt.NDArray[Any]

_DOMAIN = b"distily-cache tail v1\0"
# The increment and the two multipliers of splitmix64 (Steele, Lea, Flood 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def row_shifts(tokens: Array, start: int, stop: int, seed: int) -> npt.NDArray[np.float64]:
    """float64 [stop - start]: U of positions start..stop of the sample `tokens` (int [T]), in [0, 1)."""
    key = blake3(_DOMAIN + seed.to_bytes(8, "little") + tokens.astype("<i4").tobytes()).digest(8)
    return uniforms(key, start, stop)


def uniforms(key: bytes, start: int, stop: int) -> npt.NDArray[np.float64]:
    """float64 [stop - start]: numbers start..stop of the splitmix64 generator of 8 bytes, in [0, 1)."""
    with np.errstate(over="ignore"):
        z = np.frombuffer(key, "<u8") + np.arange(start + 1, stop + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX[0]
        z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def van_der_corput(count: int) -> npt.NDArray[np.float64]:
    """float64 [count]: 0, 1/2, 1/4, 3/4, 1/8, ... (the bits of the index, mirrored at the point)."""
    index = np.arange(count)
    value = np.zeros(count)
    for bit in range(max(1, count.bit_length())):
        value += ((index >> bit) & 1) * 2.0 ** -(bit + 1)
    return value


def first_draws(shifts: Array, have: int, want: int) -> npt.NDArray[np.bool_]:
    """bool [R, have]: which of the `have` draws of each row, sorted by u, are among the first `want`.

    shifts: float64 [R], U of each row. Draws sorted by u are sorted by token id.
    """
    points = (shifts[:, None] + van_der_corput(have)) % 1.0
    return np.argsort(points, axis=1, kind="stable") < want
