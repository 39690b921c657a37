"""Hidden states in four bits a number: what a row of bytes holds, and how NumPy reads it.

A state is the sum of a few outliers, stored as they are, and of a rest in blocks of 64 numbers. A block is
rotated by random signs and a Walsh-Hadamard transform, which need no stored matrix and make its numbers look
Gaussian whatever they were (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456). Each is then one of 16 levels
times the scale of the block, which is its largest number with its sign. Outliers are kept apart because a
channel of a residual stream that is a hundred times larger than the rest would spoil the numbers beside it.

A row of bytes holds, one after the other and little-endian: the codes of all blocks, two in a byte, the first
in its low half; the scale of each block, bfloat16; the columns of the outliers, uint16, and their values,
bfloat16. The last block is filled up with zeros. Why so: benchmarks/results/hidden_bytes.md.

`levels` and the rotation take arrays of NumPy and tensors of torch alike. They add, subtract and multiply one
number at a time in the same order everywhere, so that both read the same bits from a row on every device.

Shape letters: N states, D hidden size, S blocks, P numbers of all blocks, K outliers, W bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 64
# Outliers have their columns in 16 bits.
MAX_SIZE = 2**16
_COLUMNS_PER_OUTLIER = 192
# The levels as a polynomial of code - 7.5, from the constant on: within 0.005 of those of Lloyd and Max for a
# block of Gaussian numbers over its largest. A table, as NF4 (arXiv:2305.14314) has one, would have to be
# brought to the device.
_LEVELS = (0.00135, 0.106, 6.0e-5, 2.52e-5, 1.61e-5, 5.86e-6)


@dataclass(frozen=True)
class Int4Layout:
    """Where the parts of a row lie, for states of `size` numbers."""

    size: int

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
        """K."""
        return self.size // _COLUMNS_PER_OUTLIER

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """Where codes, scales, columns and values of outliers end; the last is W."""
        codes, scales, outliers = self.padded // 2, 2 * self.blocks, 2 * self.outliers
        return codes, codes + scales, codes + scales + outliers, codes + scales + 2 * outliers

    @property
    def row_bytes(self) -> int:
        """W."""
        return self.ends[-1]


def decode_int4(rows_NW: Array, size: int) -> npt.NDArray[np.float32]:
    """float32 [N, D], D = `size`, of rows of bytes, uint8; IndexError for an outlier in no column."""
    layout = Int4Layout(size)
    codes, scales, columns, values = map(np.ascontiguousarray, np.split(rows_NW, layout.ends[:-1], axis=1))
    table = levels(np.arange(16, dtype=np.float32))
    states_PN = np.empty((layout.padded, len(rows_NW)), np.float32)
    states_PN[0::2], states_PN[1::2] = table[codes.T & 15], table[codes.T >> 4]
    states_PN *= np.repeat(_bf16(scales).T, BLOCK, axis=0)
    unrotate_(states_PN, np.arange(layout.padded))
    states_ND = np.ascontiguousarray(states_PN[:size].T)
    np.add.at(states_ND, (np.arange(len(rows_NW))[:, None], columns.view("<u2")), _bf16(values))
    return states_ND


def outlier_columns(rows_NW: Array, size: int) -> npt.NDArray[np.uint16]:
    """The columns of the outliers of rows of bytes, uint16 [N, K]."""
    _, start, stop, _ = Int4Layout(size).ends
    return np.ascontiguousarray(rows_NW[:, start:stop]).view("<u2")


def levels(codes: Any) -> Any:
    """What codes 0 to 15 stand for, given as float32 of any shape: ascending, from about -0.88 to 1."""
    x = codes - 7.5
    square = x * x
    even, odd = ((_LEVELS[4 + i] * square + _LEVELS[2 + i]) * square + _LEVELS[i] for i in range(2))
    return odd * x + even


def rotate_(states_PN: Any, columns_P: Any) -> None:
    """Rotate each block of N states in place.

    Args:
        states_PN: float32, C-contiguous.
        columns_P: int64, the numbers 0 to P - 1, of the same library and on the same device.
    """
    states_PN *= _signs(columns_P)
    _hadamard_(states_PN)


def unrotate_(states_PN: Any, columns_P: Any) -> None:
    """The inverse of `rotate_`, but for the rounding of float32."""
    _hadamard_(states_PN)
    states_PN *= _signs(columns_P)


def _signs(columns_P: Any) -> Any:
    """+1 or -1 for each column, [P, 1]: a bit of a hash of its number (lowbias32, C. Wellons 2018)."""
    hashed = columns_P + 1
    # Products may wrap around in 64 bits; their lower halves are right all the same.
    hashed = ((hashed ^ (hashed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (1 - 2 * ((hashed ^ (hashed >> 16)) & 1))[:, None]


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


def _bf16(data: Array) -> npt.NDArray[np.float32]:
    """float32 of rows of bytes, two for each bfloat16."""
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
