"""The LM head with its loss, forward and backward, beside the kernels of others where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from steps import sparse_targets
from torch import Tensor

from gpu_check import rows
from gpu_check.measuring import Laps, calls_of, device, fresh_memory, held_bytes, peak_bytes
from gpu_check.processes import ABSENT
from gpu_check.sizes import Size
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, cross_entropy, forward_kl
from student.losses.sparse_pass import sparse_head_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden [N, D], weight [V, D] and label [N]; a sum
_MODULES = {rows.CUT_CROSS_ENTROPY: "cut_cross_entropy", rows.LIGER: "liger_kernel"}


def measure(row: str, size: Size, folder: Path) -> dict[str, Any]:
    """Seconds of loss and gradients, and what they need beside weight and hidden states, in bytes."""
    del folder
    vocabulary, name = int(rows.parts(row)[0].replace(",", "")), rows.parts(row)[1]
    here = device()
    if name in _MODULES:
        if find_spec(_MODULES[name]) is None:
            return {ABSENT: "not installed"}
        if here.type != "cuda":
            return {ABSENT: "runs on a GPU only"}
    torch.manual_seed(0)
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    n, d = size.head_positions, size.head_width
    hidden_ND = torch.randn(n, d, device=here).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, d, device=here) / d**0.5).to(dtype).requires_grad_()
    label_N = torch.randint(vocabulary, (n,), device=here)
    loss = make_loss(name, label_N, vocabulary)

    def once() -> None:
        hidden_ND.grad = weight_VD.grad = None
        loss(hidden_ND, weight_VD, label_N).backward()

    once()  # compiles, and tunes itself
    once()
    hidden_ND.grad = weight_VD.grad = None
    fresh_memory()
    before = held_bytes()
    once()
    peak = peak_bytes()
    laps = Laps()
    laps.mark()
    for _ in range(size.repeats):
        once()
        laps.mark()
    seconds, calls = laps.median(), calls_of(once)
    assert hidden_ND.grad is not None
    if not hidden_ND.grad.isfinite().all():
        raise ArithmeticError("gradients that are not finite")
    return {
        "seconds": seconds,
        "bytes": None if peak is None else peak - before,
        "launches": None if calls is None else calls.launches,
        "waits": None if calls is None else calls.waits,
        "positions": n,
        "width": d,
    }


def make_loss(name: str, label_N: Tensor, vocabulary: int) -> Loss:
    """The implementation of that name, on sums over positions."""
    if name == rows.CUT_CROSS_ENTROPY:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, label: linear_cross_entropy(hidden, weight, label, reduction="sum")
    if name == rows.LIGER:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden, weight, label: liger(weight, hidden, label)
    if name == rows.FUSED_KL:
        return ours(sparse_targets(label_N, vocabulary), forward_kl)
    empty = label_N.new_empty(len(label_N), 0)
    no_head = SparseTargets(
        ids_NK=empty,
        logprob_NK=empty.float(),
        tail_N=torch.zeros_like(label_N, dtype=torch.float),
        label_N=label_N,
    )
    return ours(no_head, cross_entropy)


def ours(targets: SparseTargets, function: Callable[..., Tensor]) -> Loss:
    """The fused head of trainings."""

    def loss(hidden_ND: Tensor, weight_VD: Tensor, _label: Tensor) -> Tensor:
        return sparse_head_loss(
            hidden_ND=hidden_ND,
            weight_VD=weight_VD,
            bias_V=None,
            targets=targets,
            terms=[(function, 1.0)],
            transform=HeadTransform(),
        ).total

    return loss
