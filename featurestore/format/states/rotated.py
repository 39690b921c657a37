"""Hidden states in four or two bits a number: what a row of bytes holds, and how NumPy reads it.

A state is the sum of a few outliers, stored as they are, and of a rest in blocks of 64 numbers. A block is
rotated by random signs and a Walsh-Hadamard transform, which need no stored matrix and make its numbers look
Gaussian whatever they were (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456). Each is then one of 16 or 4
levels times the scale of the block. Outliers are kept apart because a channel of a residual stream that is a
hundred times larger than the rest would spoil the numbers beside it.

The scale of int4 is the largest number of the block with its sign. Two bits lose a third of a state's
length, and what is lost must not look the same at every position, or it adds up in the gradient of a step.
So the scale of int2 makes the stored block, seen along the exact one, as long as that (RaBitQ,
arXiv:2405.12497), and its signs are one of 256 patterns, which the bytes of the row's outliers choose.

A row of bytes holds, one after the other and little-endian: the codes of all blocks, two or four in a byte,
the first in its lowest bits; the scale of each block, bfloat16; the columns of the outliers, uint16, and
their values, bfloat16. The last block is filled up with zeros. Why so: benchmarks/results/hidden_bytes.md.

`levels` and the rotation take arrays of NumPy and tensors of torch alike. They add, subtract and multiply one
number at a time in the same order everywhere, so that both read the same bits from a row on every device.

Shape letters: N states, D hidden size, S blocks, P numbers of all blocks, K outliers, W bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.states.bfloat16 import from_bf16

Array = npt.NDArray[Any]

BLOCK = 64
# Outliers have their columns in 16 bits.
MAX_SIZE = 2**16
PATTERNS = 256
# dtype -> bits of a code.
ROTATED = {"int4": 4, "int2": 2}
_COLUMNS_PER_OUTLIER = 192
# The levels as a polynomial of code less the middle code, from the constant on. Of 4 bits: within 0.005 of
# those of Lloyd and Max for a block of Gaussian numbers over its largest; of 2 bits: theirs for a Gaussian. A
# table, as NF4 (arXiv:2305.14314) has one, would have to be brought to the device.
_LEVELS = {
    4: (0.00135, 0.106, 6.0e-5, 2.52e-5, 1.61e-5, 5.86e-6),
    2: (0.0, 0.8929, 0.0, 0.05067, 0.0, 0.0),
}


@dataclass(frozen=True)
class RotatedLayout:
    """Where the parts of a row lie, for states of `size` numbers stored as `dtype`, a key of ROTATED."""

    dtype: str
    size: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return ROTATED[self.dtype]

    @property
    def blocks(self) -> int:
        """S."""
        return -(-self.size // BLOCK)

    @property
    def padded(self) -> int:
        """P."""
        return self.blocks * BLOCK

    @property
    def outliers(self) -> int:
        """K; int2 has at least one, whose bytes choose the signs."""
        return max(self.size // _COLUMNS_PER_OUTLIER, int(self.bits == 2))

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """Where codes, scales, columns and values of outliers end; the last is W."""
        codes, scales, outliers = self.padded * self.bits // 8, 2 * self.blocks, 2 * self.outliers
        return codes, codes + scales, codes + scales + outliers, codes + scales + 2 * outliers

    @property
    def row_bytes(self) -> int:
        """W."""
        return self.ends[-1]


def decode_rotated(rows_NW: Array, dtype: str, size: int) -> npt.NDArray[np.float32]:
    """float32 [N, D], D = `size`, of rows of bytes, uint8; IndexError for an outlier in no column."""
    layout = RotatedLayout(dtype, size)
    codes, scales, columns, values = map(np.ascontiguousarray, np.split(rows_NW, layout.ends[:-1], axis=1))
    table = levels(np.arange(2**layout.bits, dtype=np.float32), layout.bits)
    states_PN = np.empty((layout.padded, len(rows_NW)), np.float32)
    in_byte = 8 // layout.bits
    for place in range(in_byte):
        states_PN[place::in_byte] = table[codes.T >> place * layout.bits & (len(table) - 1)]
    states_PN *= np.repeat(from_bf16(scales.view("<u2")).T, BLOCK, axis=0)
    signs = signs_of(
        np.arange(layout.padded + PATTERNS), rows_NW[:, layout.ends[1] :].astype(np.int64), layout
    )
    unrotate_(states_PN, signs)
    states_ND = np.ascontiguousarray(states_PN[:size].T)
    np.add.at(
        states_ND, (np.arange(len(rows_NW))[:, None], columns.view("<u2")), from_bf16(values.view("<u2"))
    )
    return states_ND


def outlier_columns(rows_NW: Array, dtype: str, size: int) -> npt.NDArray[np.uint16]:
    """The columns of the outliers of rows of bytes, uint16 [N, K]."""
    _, start, stop, _ = RotatedLayout(dtype, size).ends
    return np.ascontiguousarray(rows_NW[:, start:stop]).view("<u2")


def levels(codes: Any, bits: int) -> Any:
    """What codes from 0 on stand for, given as float32 of any shape: ascending; for 4 bits from about -0.88
    to 1, for 2 bits from -1.51 to 1.51.
    """
    terms = _LEVELS[bits]
    x = codes - (2**bits - 1) / 2
    square = x * x
    even, odd = ((terms[4 + i] * square + terms[2 + i]) * square + terms[i] for i in range(2))
    return odd * x + even


def signs_of(columns: Any, outliers_NB: Any, layout: RotatedLayout) -> Any:
    """The sign of each number of N states, +1 or -1: [P, 1] for int4, where all have the same, else [P, N].

    Args:
        columns: int64, the numbers 0 to P + PATTERNS - 1.
        outliers_NB: int64, the bytes of columns and values of outliers as they stand in the rows, B = 4 K; of
            the same library and on the same device.
    """
    # A bit of a hash of the column's number (lowbias32, C. Wellons 2018). Products may wrap around in 64
    # bits; their lower halves are right all the same.
    hashed = columns + 1
    hashed = ((hashed ^ (hashed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    signs = 1 - 2 * ((hashed ^ (hashed >> 16)) & 1)
    if layout.bits == 4:
        return signs[: layout.padded, None]
    # Pattern k begins at column k; random signs that are moved by some places are other random signs.
    weights_B = 2 * columns[: outliers_NB.shape[1]] + 1
    pattern_N = (outliers_NB * weights_B).sum(1) & (PATTERNS - 1)
    return signs[columns[: layout.padded, None] + pattern_N[None, :]]


def rotate_(states_PN: Any, signs: Any) -> None:
    """Rotate each block of N states in place: float32, C-contiguous; signs: those of `signs_of`."""
    states_PN *= signs
    _hadamard_(states_PN)


def unrotate_(states_PN: Any, signs: Any) -> None:
    """The inverse of `rotate_`, but for the rounding of float32."""
    _hadamard_(states_PN)
    states_PN *= signs


def _hadamard_(states_PN: Any) -> None:
    """The normalised Walsh-Hadamard transform of each block, in place; it is its own inverse."""
    step = 1
    while step < BLOCK:
        pairs = states_PN.reshape(len(states_PN) // (2 * step), 2, step, -1)  # a view, rows lie side by side
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper += lower
        lower[...] = difference
        step *= 2
    states_PN *= BLOCK**-0.5
