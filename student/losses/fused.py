"""The LM head and its losses in one pass over chunks of positions, so that N x V never exists.

For a chunk of n positions: logits = h W^T (in the compute dtype), reduced to head logits, tail logsumexp and
label logit in float32 (on request also the tail at other temperatures and the largest logits); the losses and
their gradient with respect to these few numbers (`student.losses.sparse`); and at once the gradient with
respect to every logit, from which dH and dW follow. For a logit outside the head that gradient is (d loss / d
tail) * softmax over the tail; head, label and largest columns add theirs. Memory: chunk x V, once in the
compute dtype and once in float32 where the two differ, and once more for each further temperature. The idea
of computing the gradient in the forward pass is that of apple/ml-cross-entropy and the Liger kernels;
soft-capping as in Gemma 2 (arXiv:2408.00118).

Shape letters: N positions, n positions of a chunk, V vocabulary, D hidden size, K head columns, S loss terms.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.sparse import ReducedLogits, Reduction, SparseTargets

ReducedLoss = Callable[[ReducedLogits, SparseTargets], Tensor]
Terms = tuple[tuple[ReducedLoss, float], ...]
CHUNK_ELEMENTS = 2**25  # logits held at a time


@dataclass(frozen=True)
class HeadTransform:
    """What the architecture does to the raw logits: z = softcap * tanh(scale * raw / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> HeadTransform:
        """Read `logit_scale` (Cohere, multiplies), `logits_scaling` (Granite, divides),
        `final_logit_softcapping`.
        """
        text = config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
            getattr(text, "logits_scaling", None) or 1.0
        )
        softcap = getattr(text, "final_logit_softcapping", None)
        return cls(scale, float(softcap) if softcap else None)


@dataclass(frozen=True)
class HeadLoss:
    """Result of `sparse_head_loss`: the differentiable sum, and what is worth knowing about each position.

    total: float scalar, weighted sum over terms and positions. terms_SN: detached values of every term.
    agree_N: bool, the student's most likely token is the teacher's (False where the row has no head).
    """

    total: Tensor
    terms_SN: Tensor
    agree_N: Tensor


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of matrix products here: autocast's when it is on for this device, else the dtype of `hidden`."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def sparse_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    terms: Sequence[tuple[ReducedLoss, float]],
    transform: HeadTransform,
    chunk: int | None = None,
    reduction: Reduction | None = None,
) -> HeadLoss:
    """Sum over positions and terms of weight * loss(student, teacher), differentiable in hidden, weight and
    bias.

    Gradients are computed during this call, for the inputs that require them, and only scaled in the backward
    pass. `chunk` is the number of positions held at a time (default: CHUNK_ELEMENTS / V, less for further
    temperatures). `reduction`: what the losses want beside head, tail and label.
    """
    reduction = reduction or Reduction()
    chunk = chunk or max(1, CHUNK_ELEMENTS // (weight_VD.shape[0] * (1 + len(reduction.tails))))
    plan = (tuple(terms), transform, reduction, chunk)
    out = _FusedHead.apply(hidden_ND, weight_VD, bias_V, targets, plan)  # type: ignore[no-untyped-call]
    return HeadLoss(*out)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: SparseTargets,
        plan: tuple[Terms, HeadTransform, Reduction, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms, transform, reduction, chunk = plan
        dtype = compute_dtype(hidden_ND)
        h_ND, w_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        run = _HeadPass(w_VD, None if bias_V is None else bias_V.detach(), terms, transform, reduction)
        run.prepare(h_ND, min(chunk, len(h_ND)), needs=ctx.needs_input_grad)
        for start in range(0, len(h_ND), chunk):
            run.step(h_ND[start : start + chunk], targets.slice(start, start + chunk), start)
        total = run.total()
        ctx.grads = (run.dh_ND, run.dw_VD, run.db_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(run.terms_SN, run.agree_N)
        return total, run.terms_SN, run.agree_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _terms: Tensor, _agree: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the fused head cannot be differentiated a second time: it scales its gradients in place"
            )
        grads = [
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*grads, None, None)


class _HeadPass:
    """One pass over the chunks: owns the buffers that all chunks share and the gradients that they add to."""

    def __init__(
        self,
        w_VD: Tensor,
        bias_V: Tensor | None,
        terms: Terms,
        transform: HeadTransform,
        reduction: Reduction,
    ) -> None:
        self.w_VD, self.bias_V, self.terms, self.transform = w_VD, bias_V, terms, transform
        self.reduction = reduction
        self.exact = torch.float64 if w_VD.dtype == torch.float64 else torch.float32

    def prepare(self, h_ND: Tensor, chunk: int, needs: Sequence[bool]) -> None:
        """Allocate buffers and results; `needs` says whether hidden, weight and bias want a gradient."""
        v, d = self.w_VD.shape
        n = len(h_ND)
        self.z_nV = h_ND.new_empty(chunk, v)
        self.exact_nV = (
            self.z_nV if self.z_nV.dtype == self.exact else h_ND.new_empty(chunk, v, dtype=self.exact)
        )
        self.tails = {t: h_ND.new_empty(chunk, v, dtype=self.exact) for t in self.reduction.tails}
        self.terms_SN = h_ND.new_zeros(len(self.terms), n, dtype=self.exact)
        self.agree_N = torch.zeros(n, dtype=torch.bool, device=h_ND.device)
        self.dh_ND = h_ND.new_empty(n, d) if needs[0] else None
        self.dw_VD = h_ND.new_zeros(v, d, dtype=self.exact) if needs[1] else None
        self.part_VD = h_ND.new_empty(v, d) if needs[1] and h_ND.dtype != self.exact else None
        self.db_V = h_ND.new_zeros(v, dtype=self.exact) if needs[2] else None
        self.wants_grad = any(needs[:3])

    def total(self) -> Tensor:
        """Weighted sum of everything, a scalar."""
        weights_S = self.terms_SN.new_tensor([weight for _, weight in self.terms])
        return (weights_S * self.terms_SN.sum(-1)).sum()

    def step(self, h_nD: Tensor, targets: SparseTargets, start: int) -> None:
        """Losses of one chunk, and its gradients when somebody wants them."""
        n = len(h_nD)
        z_nV, slope_nV = self._logits(h_nD)
        ids_nK = targets.ids_NK
        real_nK = torch.isfinite(targets.logprob_NK)
        head_nK = z_nV.gather(1, ids_nK).masked_fill_(~real_nK, -math.inf)
        label_n = z_nV.gather(1, targets.label_N.unsqueeze(1)).squeeze(1)
        width = min(targets.head_columns, z_nV.shape[1]) if self.reduction.ranked else 0
        top_nK, top_ids_nK = z_nV.topk(width) if width else (z_nV.new_empty(n, 0), ids_nK[:, :0])
        z_nV.scatter_(1, ids_nK, -math.inf)
        peak_n = z_nV.amax(-1)
        # A row whose head is the whole vocabulary has no tail: any finite shift keeps exp(-inf) at zero.
        shift_n = torch.where(torch.isfinite(peak_n), peak_n, 0.0)
        z_nV.sub_(shift_n.unsqueeze(1))
        exps = {t: torch.div(z_nV, t, out=buffer[:n]).exp_() for t, buffer in self.tails.items()}
        exps = {1.0: z_nV.exp_(), **exps}
        sums = {t: exp_nV.sum(-1) for t, exp_nV in exps.items()}
        tails = [shift_n / t + sum_n.log() for t, sum_n in sums.items()]
        slopes = self._losses([head_nK, label_n, top_nK, *tails], targets, start)
        self.agree_N[start : start + n] = _agreement(head_nK, peak_n)
        if slopes is not None:
            d_head_nK, d_label_n, d_top_nK, *d_tails = slopes
            for (t, exp_nV), d_tail_n in zip(exps.items(), d_tails, strict=True):
                exp_nV.mul_(torch.where(sums[t] > 0, d_tail_n / (sums[t] * t), 0.0).unsqueeze(1))
                if t != 1.0:
                    z_nV.add_(exp_nV)
            # Padding repeats column 0, so it must write that column's value.
            d_head_nK = torch.where(real_nK, d_head_nK, d_head_nK[:, :1])
            extra = [(targets.label_N.unsqueeze(1), d_label_n.unsqueeze(1)), (top_ids_nK, d_top_nK)]
            self._accumulate(h_nD, self._spread(z_nV, (ids_nK, d_head_nK), extra, slope_nV), start)

    def _logits(self, h_nD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Transformed logits in the exact dtype, and d z / d raw where soft-capping makes it vary."""
        raw_nV = torch.mm(h_nD, self.w_VD.t(), out=self.z_nV[: len(h_nD)])
        z_nV = self.exact_nV[: len(h_nD)]
        if z_nV.dtype != raw_nV.dtype:
            z_nV.copy_(raw_nV)
        if self.bias_V is not None:
            z_nV.add_(self.bias_V)
        if self.transform.scale != 1.0:
            z_nV.mul_(self.transform.scale)
        cap = self.transform.softcap
        if cap is None:
            return z_nV, None
        z_nV.div_(cap).tanh_()
        slope_nV = 1.0 - z_nV.square() if self.wants_grad else None
        return z_nV.mul_(cap), slope_nV

    def _losses(self, leaves: list[Tensor], targets: SparseTargets, start: int) -> tuple[Tensor, ...] | None:
        """Fill in the terms' values; d total / d leaves, leaves: head, label, top, tails."""
        with torch.set_grad_enabled(self.wants_grad):
            leaves = [leaf.requires_grad_(self.wants_grad) for leaf in leaves]
            head_nK, label_n, top_nK, tail_n, *others = leaves
            tails = dict(zip(self.reduction.tails, others, strict=True))
            ranked_nK = top_nK if self.reduction.ranked else None
            student = ReducedLogits(head_nK, tail_n, label_n, tails, ranked_nK)
            total = tail_n.new_zeros(())
            for index, (loss, weight) in enumerate(self.terms):
                value_n = loss(student, targets)
                self.terms_SN[index, start : start + len(value_n)] = value_n.detach()
                if weight:
                    total = total + weight * value_n.sum()
            if not total.requires_grad:
                return None
            slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return tuple(slope * self.transform.scale for slope in slopes)

    def _spread(
        self,
        g_nV: Tensor,
        head: tuple[Tensor, Tensor],
        extra: Sequence[tuple[Tensor, Tensor]],
        slope_nV: Tensor | None,
    ) -> Tensor:
        """d total / d raw logits, in the compute dtype; `g_nV` holds what the tails give, zero at the head.

        extra: (columns, what to add there).
        """
        # Set, not add, in the exact dtype: bfloat16 scatters and scatter_add_ copy the whole tensor on CPUs.
        g_nV.scatter_(1, *head)
        for ids_nK, d_nK in extra:
            g_nV.scatter_(1, ids_nK, g_nV.gather(1, ids_nK) + d_nK)
        if slope_nV is not None:
            g_nV.mul_(slope_nV)
        low_nV = self.z_nV[: len(g_nV)]
        return low_nV if low_nV.dtype == g_nV.dtype else low_nV.copy_(g_nV)

    def _accumulate(self, h_nD: Tensor, g_nV: Tensor, start: int) -> None:
        if self.dh_ND is not None:
            torch.mm(g_nV, self.w_VD, out=self.dh_ND[start : start + len(h_nD)])
        if self.dw_VD is not None and self.part_VD is None:
            self.dw_VD.addmm_(g_nV.t(), h_nD)
        elif self.dw_VD is not None:
            self.dw_VD.add_(torch.mm(g_nV.t(), h_nD, out=self.part_VD))
        if self.db_V is not None:
            self.db_V.add_(g_nV.sum(0, dtype=self.exact))


def _agreement(head_nK: Tensor, tail_peak_n: Tensor) -> Tensor:
    """Whether the student's largest logit is in column 0 of the head, the teacher's first choice;
    bool [n].
    """
    if head_nK.shape[1] == 0:
        return torch.zeros_like(tail_peak_n, dtype=torch.bool)
    return head_nK[:, 0] >= torch.maximum(head_nK.amax(-1), tail_peak_n)
