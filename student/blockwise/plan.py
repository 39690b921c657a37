"""Which blocks a student is made of, what each learns from, and which samples it reads: pure planning.

A *boundary* is the residual stream behind one of the teacher's layers, numbered as in transformers'
`output_hidden_states`; that behind the last layer is behind the final norm, too. A block is what lies between
two boundaries that the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise

from student.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Block:
    """Layers of a student that are trained together.

    Args:
        number: from 0 on, in the order of the student.
        layers: their numbers in the student.
        given: the boundary that goes into them; 0 for the embeddings.
        target: the boundary that they are to give.
        last: whether the final norm belongs to them.

    Example:
        Block(number=1, layers=(4, 5, 6, 7), given=4, target=8, last=False)
    """

    number: int
    layers: tuple[int, ...]
    given: int
    target: int
    last: bool

    def __str__(self) -> str:
        first, end = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == end else f"layers {first}-{end}"


def plan_blocks(copied: Sequence[int], boundaries: Sequence[int], depth: int) -> list[Block]:
    """The blocks of a student.

    Args:
        copied: the teacher's layer, 0 to depth - 1, of each layer of the student.
        boundaries: those whose states the cache holds; 0 is not needed.
        depth: layers of the teacher.

    Returns:
        Blocks that together have each layer of the student once. A layer belongs to the first boundary behind
        its teacher's layer, or to the last one where it is the student's last.

    Raises:
        UserError: the student's layers are not in the teacher's order, or boundaries are missing; the line
            names the flag of `generate` that adds them.

    Example:
        plan_blocks(range(30), range(2, 31, 2), 30)  # 15 blocks of two layers
    """
    for before, layer in pairwise(copied):
        if layer <= before:
            raise UserError(
                f"--copy-layers: --init blockwise trains layers in the teacher's order, and {layer} follows "
                f"{before}; give them ascending, each once"
            )
    _check_boundaries(boundaries, depth)
    inside = sorted({boundary for boundary in boundaries if 0 < boundary < depth})
    blocks: list[Block] = []
    placed = given = 0
    for boundary in [*inside, depth]:
        end = len(copied) if boundary == depth else sum(layer < boundary for layer in copied)
        if end == placed:
            continue
        # Nothing but the teacher's last state fits the head that follows the student's last layer.
        target = depth if end == len(copied) else boundary
        layers = tuple(range(placed, end))
        blocks.append(
            Block(number=len(blocks), layers=layers, given=given, target=target, last=end == len(copied))
        )
        placed, given = end, target
    return blocks


def _check_boundaries(boundaries: Sequence[int], depth: int) -> None:
    """UserError unless they are the last one and every n-th, with n the smallest distance of two of them."""
    if depth not in boundaries:
        raise UserError(
            "--init blockwise: the cache lacks the teacher's last states; add them with `distily-cache "
            "generate ... --final`"
        )
    inside = sorted({boundary for boundary in boundaries if 0 < boundary < depth})
    distances = [b - a for a, b in pairwise([0, *inside])]
    step = min(distances, default=1)
    missing = [layer for layer in range(step, depth, step) if layer not in inside]
    if missing:
        raise UserError(
            f"--init blockwise: the cache lacks hidden states between the blocks; add them with "
            f"`distily-cache generate ... --hidden-layers {','.join(map(str, missing))}` (or every n-th)"
        )


def drawn(order: Callable[[int], Sequence[int]], total: int) -> list[int]:
    """The samples of all steps of a block, one after the other.

    Args:
        order: of an epoch, which holds each sample once.
        total: samples of all steps.

    Returns:
        The first `total` samples of the epochs in a row, each from its end; so a cache that has more is not
        read whole, and a short end-to-end training, which reads its first epoch from the start, learns from
        other samples than the blocks have.
    """

    def epochs() -> Iterator[int]:
        for epoch in count():
            yield from reversed(order(epoch))

    return list(islice(epochs(), total))
