"""Weights of which each process holds some rows (FSDP2), and what lies on disk: whole tensors.

A sharded tensor is a DTensor of torch, cut along its first dimension into one block of rows for each process;
the last blocks may be shorter, or empty. Of any other tensor the functions below take all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor


class OwnRows(NamedTuple):
    """The rows of a tensor that this process holds, and the number of the first of them."""

    values: Tensor
    start: int


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share a module's weights."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def rows(tensor: Tensor) -> OwnRows:
    """Those of this process; they share the memory of `tensor`."""
    if not isinstance(tensor, DTensor):
        return OwnRows(tensor, 0)
    return OwnRows(tensor.to_local(), _start(tensor))


def _start(tensor: DTensor) -> int:
    mesh, length = tensor.device_mesh, tensor.shape[0]
    return min(mesh.get_local_rank() * -(-length // mesh.size()), length)


def shard_like(whole: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, sharded as `own` is; every process has to have it. A sharded one stays as it is."""
    if not isinstance(own, DTensor) or isinstance(whole, DTensor):
        return whole
    start, count = _start(own), own.to_local().shape[0]
    return DTensor.from_local(
        whole[start : start + count].to(own.device, copy=True),
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def over_all(values: Tensor, tensor: Tensor, op: Any = distributed.ReduceOp.SUM) -> Tensor:
    """What was computed of the rows of each process, reduced over the processes that share `tensor`."""
    if isinstance(tensor, DTensor):
        distributed.all_reduce(values, op, group=tensor.device_mesh.get_group())
    return values


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors, tied ones once; see `gather`."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in module.named_parameters()}
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    whole: dict[str, Tensor] = gather(state, keep)
    return whole


def gather(state: Any, keep: bool) -> Any:
    """A state_dict with whole tensors on the CPU; all processes have to call this at the same time.

    keep: whether this process is to get them; others get None instead of each sharded tensor.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {name: gather(value, keep) for name, value in state.items()}
    return [gather(value, keep) for value in state] if isinstance(state, list) else state


def load_whole(module: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> Any:
    """`module.load_state_dict` of whole tensors, of which each process takes its rows."""
    own = module.state_dict()
    sharded = {name: shard_like(whole, own[name]) if name in own else whole for name, whole in state.items()}
    return module.load_state_dict(sharded, strict=strict)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state_dict of an optimizer, each tensor sharded like its parameter."""
    places = [place for group in state["param_groups"] for place in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        place: {
            name: shard_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in state["state"][place].items()
        }
        for place, parameter in zip(places, parameters, strict=True)
        if place in state["state"]
    }
    return state | {"state": sharded}
