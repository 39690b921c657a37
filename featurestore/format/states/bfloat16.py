"""bfloat16 in NumPy, which has no such type: its bits as uint16.

The upper half of a float32's bits are those of the bfloat16 next to zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even, of numbers that are finite and not negative."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The numbers of bfloat16 bits, uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
