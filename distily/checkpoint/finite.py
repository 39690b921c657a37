"""NaN and infinite weights, found in a checkpoint's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np

from distily.checkpoint.weights import StoredTensor

# Type -> (numpy type of its bits, all bits but the sign, the smallest of those patterns that is not finite).
_PATTERNS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 2**63 - 1, 0x7FF << 52),
    "F32": ("<u4", 2**31 - 1, 0xFF << 23),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
}
_CHUNK = 2**18  # elements; small enough for a core's cache


def not_finite(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity, sorted. Every byte is read, by all cores."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        wrong = pool.map(_is_wrong, tensors.values())
        return sorted(name for name, one in zip(tensors, wrong, strict=True) if one)


def _is_wrong(tensor: StoredTensor) -> bool:
    if tensor.dtype not in _PATTERNS or tensor.start == tensor.end:
        return False
    dtype, magnitude, limit = _PATTERNS[tensor.dtype]
    count = (tensor.end - tensor.start) // np.dtype(dtype).itemsize
    # Mapped as bytes first: a header may leave the numbers unaligned.
    data = np.memmap(tensor.file, np.uint8, "r", tensor.start, (count * np.dtype(dtype).itemsize,))
    bits = data.view(dtype)
    mask = bits.dtype.type(magnitude)
    buffer = np.empty(min(count, _CHUNK), bits.dtype)
    for start in range(0, count, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if int(np.bitwise_and(chunk, mask, out=buffer[: len(chunk)]).max()) >= limit:
            return True
    return False
