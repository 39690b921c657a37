"""`--fsdp`: each process holds some rows of every weight, with their gradients and optimizer state (FSDP2).

A decoder layer is one unit: its weights are gathered for its forward pass, dropped, and gathered once more
for its backward pass. What is around the layers, embeddings and LM head above all, is whole during all of a
step, because the fused losses read the head's weight themselves.

accelerate would shard in another way. For bfloat16 it gathers weights rounded to that type, whose ternary
form is not that of the saved ones, and returns the losses in it. On a CPU it shards nothing, and does not say
so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from student.config.sharding import LAUNCHER
from student.errors import UserError
from student.training.model import DistillationModel


@contextmanager
def without_accelerates() -> Iterator[None]:
    """Hide from accelerate that its launcher was asked for FSDP."""
    asked = os.environ.pop(LAUNCHER, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[LAUNCHER] = asked


def shard(model: DistillationModel, device: torch.device) -> None:
    """Shard a model over all processes, in place; all begin with the weights of the first one.

    Raises:
        UserError: a layer has modules whose weights are of several types.
    """
    model.to(device)
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.contiguous()
        distributed.broadcast(tensor.data, src=0)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # Gradients add up in float32; what is computed in follows from autocast, as without sharding.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.student.get_decoder().layers:
        for unit in (*_small_units(layer), layer):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # accelerate is neither to wrap it, in DDP, nor to apply autocast, which CacheTrainer does.
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def _small_units(layer: nn.Module) -> list[list[nn.Module]]:
    """The modules whose weights are of another type than most: norms beside latent weights in bfloat16. All
    weights of a unit have to be of one type.
    """
    by_type: dict[torch.dtype, list[nn.Module]] = {}
    sizes: dict[torch.dtype, int] = {}
    for module in layer.modules():
        own = list(module.parameters(recurse=False))
        if len({parameter.dtype for parameter in own}) > 1:
            raise UserError(
                "--fsdp: linear layers of this student have biases, which stay float32 beside "
                "--bitnet-masters bf16, and FSDP2 takes one type in a layer; use --bitnet-masters fp32"
            )
        for parameter in own:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        if own:
            by_type.setdefault(own[0].dtype, []).append(module)
    most = max(sizes, key=sizes.__getitem__)
    return [modules for dtype, modules in by_type.items() if dtype != most]
