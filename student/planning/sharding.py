"""What sharding over processes (FSDP2, `--fsdp`) leaves to each of them, and what it gathers for a while.

A process holds a block of rows of every weight, with its gradient and optimizer state. A decoder layer is
gathered for its forward pass and once more for its backward pass; what is around the layers is whole from the
beginning of a step to its end. Numbers of copies are upper bounds, read in torch.distributed.fsdp 2.13: a GPU
keeps buffers of one collective until the next one, so that its streams need not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from student.planning.optimizers import Parameter

# Copies of a layer: gathered, with the buffer of the collective and that of the layer before; in the backward
# pass also its gradients, and as they are sent.
IN_FORWARD, IN_LOSSES, IN_BACKWARD = 3, 1, 5


@dataclass(frozen=True)
class Gathered:
    """Bytes that are whole on every process for a while.

    layer: weights of the largest decoder layer. around: weights outside the layers; gradients: of those.
    """

    layer: int
    around: int
    gradients: int


def shards(parameters: Sequence[Parameter], processes: int) -> list[Parameter]:
    """What one process holds: blocks of rows, all as large as the largest."""
    return [
        replace(one, shape=(-(-one.shape[0] // processes), *one.shape[1:])) if one.shape else one
        for one in parameters
    ]


def gathered(parameters: Sequence[Parameter]) -> Gathered:
    """Of whole parameters."""
    layers: dict[int, int] = {}
    for one in parameters:
        if one.layer is not None:
            layers[one.layer] = layers.get(one.layer, 0) + one.size
    around = [one for one in parameters if one.layer is None]
    return Gathered(
        layer=max(layers.values(), default=0),
        around=sum(one.size for one in around),
        gradients=sum(one.size for one in around if one.trained),
    )
