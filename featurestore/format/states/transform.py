"""The final state in four or six bits a number, in the basis in which its error moves the distribution least.

What counts of an error e of the state that enters the LM head is the KL divergence that it makes, to second
order e' F e / 2 with F the Fisher information of the logits. A *basis* is what a capture calibrates on its
first shard: the Karhunen-Loeve transform of the states as the mean of F weighs them. Each coordinate has as
many bits as its variance deserves by reverse water-filling, in whole bits, and the levels of a Gaussian. Why:
benchmarks/results/final_tier.md.

A row of W = D * bits // 8 bytes holds its scale, bfloat16, and then one code for each of r coordinates, of
8 to 1 bits, those of the most bits first; a code begins at the lowest free bit, its own lowest bit first.

    state = mean + scale * (levels of the codes, [r]) @ decode

Shape letters: N states, D hidden size, r coordinates, W bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.states.bfloat16 import from_bf16, to_bf16

Array = npt.NDArray[Any]

# dtype -> bits a number, the scale included.
TRANSFORMED = {"klt4": 4, "klt6": 6}
MAX_BITS = 8
# A row of four bits has room for a scale and a few codes.
MIN_SIZE, MAX_TRANSFORMED = 8, 2**16
SCALE_BYTES = 2
# Of the levels of all widths: 2 of one bit, then 4 of two bits, to 256.
LEVELS = 2 ** (MAX_BITS + 1) - 2


def transformed_bytes(dtype: str, size: int) -> int:
    """W, for states of `size` numbers."""
    return size * TRANSFORMED[dtype] // 8


def basis_file(dtype: str) -> str:
    """The name in teacher/ of the basis of the store. It says nothing of the content, so that of several that
    are calibrated at once the first stays.
    """
    return f"{dtype}.safetensors"


def code_bits(dtype: str, size: int) -> int:
    """Bits of all codes of a row."""
    return 8 * (transformed_bytes(dtype, size) - SCALE_BYTES)


@dataclass(frozen=True, kw_only=True, eq=False)
class Width:
    """The `count` coordinates from `first` on that have `bits` each, from bit `start` of the codes on; levels
    [2^bits].
    """

    bits: int
    first: int
    count: int
    start: int
    levels: Array

    @property
    def coordinates(self) -> slice:
        """Where they are in a state."""
        return slice(self.first, self.first + self.count)

    def places(self, bit: int) -> slice:
        """Where bit `bit` of their codes is in a row."""
        return slice(self.start + bit, self.start + self.bits * self.count, self.bits)


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """A basis as the store holds it.

    counts: how many coordinates have 8, 7, ... 1 bits; mean float32 [D]; encode float32 [D, r], each column a
    whole number of at most 15 bits times a power of two; decode float32 [r, D]; levels float32, see LEVELS,
    ascending for each width. digest: 32 hex digits, of the file.
    """

    dtype: str
    counts: tuple[int, ...]
    mean: Array
    encode: Array
    decode: Array
    levels: Array
    digest: str

    @property
    def size(self) -> int:
        """D."""
        return len(self.mean)

    def widths(self) -> list[Width]:
        """From the widest, those that there are."""
        found, coordinate, bit = [], 0, 0
        starts = [0, *accumulate(2**bits for bits in range(1, MAX_BITS + 1))]
        for bits, count in zip(range(MAX_BITS, 0, -1), self.counts, strict=True):
            if count:
                levels = self.levels[starts[bits - 1] : starts[bits]]
                found.append(Width(bits=bits, first=coordinate, count=count, start=bit, levels=levels))
            coordinate, bit = coordinate + count, bit + bits * count
        return found


def encode_transformed(states_ND: Array, basis: Basis) -> Array:
    """Rows of bytes, uint8 [N, W], of float32 states. A row depends on its own state alone, on every machine:
    state and basis are whole numbers whose products float64 sums without rounding, in any order.
    """
    rest_ND = states_ND.astype(np.float64) - basis.mean.astype(np.float64)
    # 21 bits of the state, 15 of the basis and 16 of the sum over D fit into the 53 of float64.
    _, exponent_N1 = np.frexp(np.abs(rest_ND).max(axis=1, keepdims=True))
    whole_ND = np.rint(np.ldexp(rest_ND, 21 - exponent_N1))
    at_Nr = np.ldexp(whole_ND @ basis.encode.astype(np.float64), exponent_N1 - 21)
    scale_N = to_bf16(np.sqrt(np.square(at_Nr).mean(axis=1)).astype(np.float32))
    at_Nr /= np.where(scale_N == 0, 1.0, from_bf16(scale_N))[:, None]
    bits = np.zeros((len(states_ND), code_bits(basis.dtype, basis.size)), np.uint8)
    for width in basis.widths():
        middle = (width.levels[1:].astype(np.float64) + width.levels[:-1]) / 2
        codes_NC = np.searchsorted(middle, at_Nr[:, width.coordinates])
        for bit in range(width.bits):
            bits[:, width.places(bit)] = codes_NC >> bit & 1
    codes = np.packbits(bits, axis=1, bitorder="little")
    return np.concatenate([scale_N.astype("<u2")[:, None].view(np.uint8), codes], axis=1)


def decode_transformed(rows_NW: Array, basis: Basis) -> npt.NDArray[np.float32]:
    """float32 [N, D] of rows of bytes, uint8."""
    scale_N = from_bf16(np.ascontiguousarray(rows_NW[:, :SCALE_BYTES]).view("<u2")[:, 0])
    bits = np.unpackbits(rows_NW[:, SCALE_BYTES:], axis=1, bitorder="little")
    at_Nr = np.empty((len(rows_NW), len(basis.decode)), np.float32)
    for width in basis.widths():
        codes_NC = np.zeros((len(rows_NW), width.count), np.int64)
        for bit in range(width.bits):
            codes_NC |= bits[:, width.places(bit)].astype(np.int64) << bit
        at_Nr[:, width.coordinates] = width.levels[codes_NC]
    at_Nr *= scale_N[:, None]
    states_ND: npt.NDArray[np.float32] = at_Nr @ basis.decode
    states_ND += basis.mean
    return states_ND
