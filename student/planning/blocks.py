"""What the blocks of `--init blockwise` take, which are trained before the whole student."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from student.blockwise.request import BlockwiseRequest
from student.blockwise.run import HELD_OUT
from student.blockwise.states import DTYPE


@dataclass(frozen=True, kw_only=True)
class BlockwiseWork:
    """Of all blocks together, by one process.

    blocks: how many. steps: of each. tokens: that a block learns from, counted each time it reads them.
    flops: of the products with ternary weights in all steps; attention, and what is computed to feed the next
    block, come on top. states_bytes: of the file of a boundary, of which there are two for a moment; 0 where
    blocks read the teacher's states.
    """

    blocks: int
    steps: int
    tokens: int
    flops: float
    states_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def blockwise_work(
    request: BlockwiseRequest | None, rows: int, tokens: float, ternary: int
) -> BlockwiseWork | None:
    """None where no blocks are asked for.

    Args:
        request: the blocks.
        rows: samples of a step.
        tokens: of a training sample, on average.
        ternary: weights in ternary layers, of the whole student.

    Returns:
        Its numbers. Two FLOPs for a weight and a token in the forward pass, four in the backward pass.
    """
    if request is None:
        return None
    learned = request.steps * rows * tokens
    read = min(request.steps * rows, len(request.split.training)) + len(request.split.held_out[:HELD_OUT])
    width = int(request.plan.config.get_text_config().hidden_size)
    stored = read * tokens * width * DTYPE.itemsize if request.inputs == "student" else 0
    return BlockwiseWork(
        blocks=len(request.blocks),
        steps=request.steps,
        tokens=round(learned),
        flops=6 * ternary * learned,
        states_bytes=round(stored),
    )
