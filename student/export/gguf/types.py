"""Block types of GGUF that hold ternary matrices exactly: a row in blocks of 256, 64 or 32 columns, each with
a float16 scale.

A matrix has one scale, so every block gets it, blocks of zeros too. Q4_0 has room for 16 values, of which
three are used: twice the bytes, and vector instructions in every llama.cpp. Q2_0 is newer than the `gguf`
package that pip has: its number and its block are given here as llama.cpp's ggml defines them.

Shape letters: O output features, I input features, N blocks, C columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """number: of the tensor type. file_type: of a file whose matrices are of it. scale_first: whether a
    block's scale stands before its weights.
    """

    name: str
    number: int
    file_type: int
    columns: int
    block_bytes: int
    scale_first: bool


TYPES = {
    one.name: one
    for one in (
        BlockType(name="TQ2_0", number=35, file_type=37, columns=256, block_bytes=66, scale_first=False),
        BlockType(name="TQ1_0", number=34, file_type=36, columns=256, block_bytes=54, scale_first=False),
        BlockType(name="Q2_0", number=42, file_type=41, columns=64, block_bytes=18, scale_first=True),
        BlockType(name="Q4_0", number=2, file_type=2, columns=32, block_bytes=18, scale_first=True),
    )
}


def to_blocks(ternary_OI: npt.NDArray[np.int8], scale: float, kind: BlockType) -> Bytes:
    """The bytes of a matrix, uint8 [O, I / C * block bytes]; `scale` is rounded to float16."""
    half = np.float16(scale)
    ternary_NC = ternary_OI.reshape(-1, kind.columns)
    if kind.name == "Q2_0":
        quants = _four_to_a_byte(ternary_NC)
    elif kind.name == "Q4_0":
        quants = _halves_to_a_byte(ternary_NC)
    else:
        import gguf

        whole = gguf.quants.quantize(ternary_NC.astype(np.float32), gguf.GGMLQuantizationType(kind.number))
        quants = whole[:, :-2]
    scales = np.broadcast_to(np.array([half]).view(np.uint8), (len(ternary_NC), 2))
    parts = [scales, quants] if kind.scale_first else [quants, scales]
    blocks: Bytes = np.concatenate(parts, axis=1).reshape(len(ternary_OI), -1)
    return blocks


def _four_to_a_byte(ternary_NC: npt.NDArray[np.int8]) -> Bytes:
    """Neighbours in one byte, the first in the lowest bits, each as value + 1."""
    fours = (ternary_NC + 1).astype(np.uint8).reshape(len(ternary_NC), -1, 4)
    packed: Bytes = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    return packed


def _halves_to_a_byte(ternary_NC: npt.NDArray[np.int8]) -> Bytes:
    """A column of the first half and that of the second in one byte, low and high bits, each as value + 8.

    The quantiser of the `gguf` package would choose a scale for each block by its extreme value.
    """
    first, second = np.split((ternary_NC + 8).astype(np.uint8), 2, axis=-1)
    packed: Bytes = first | np.left_shift(second, 4, dtype=np.uint8)
    return packed


def from_blocks(blocks: Bytes, kind: BlockType) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """What `to_blocks` wrote: ternary int8 [O, I] and the scale of every block, float32 [N]."""
    rows = len(blocks)
    blocks = blocks.reshape(-1, kind.block_bytes)
    cut = 2 if kind.scale_first else kind.block_bytes - 2
    first, second = blocks[:, :cut], blocks[:, cut:]
    half, quants = (first, second) if kind.scale_first else (second, first)
    scales = np.ascontiguousarray(half).view(np.float16).astype(np.float32)[:, 0]
    if kind.name == "Q2_0":
        values = (quants[:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        ternary = values.reshape(len(blocks), -1).astype(np.int8) - 1
    else:
        import gguf

        one = np.broadcast_to(np.array([1], np.float16).view(np.uint8), (len(blocks), 2))
        whole = np.concatenate([one, quants] if kind.scale_first else [quants, one], axis=1)
        ternary = gguf.quants.dequantize(whole, gguf.GGMLQuantizationType(kind.number)).astype(np.int8)
    return ternary.reshape(rows, -1), scales
