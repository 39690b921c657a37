"""The LM head and the losses on the sparse teacher distribution, in one pass over chunks of positions.

For a chunk of n positions: logits (`student.losses.lm_head`), reduced to head logits, tail logsumexp and
label logit in float32 (on request also the tail at other temperatures and the largest logits); the losses
and their gradient with respect to these few numbers (`student.losses.sparse`); and at once the gradient with
respect to every logit. For a logit outside the head that gradient is (d loss / d tail) * softmax over the
tail; head, label and largest columns add theirs. Memory beside the head's own: chunk x V for each further
temperature.

With tail_T = logsumexp of z / T over the columns outside the head, the gradient of a loss L is

    column v of z         d L / d z_v
    --------------------  ------------------------------------------------------------
    in the head           d L / d head_v
    outside               sum over T of  d L / d tail_T * exp(z_v / T - tail_T) / T
    the label             the above, and d L / d label
    of the largest        the above, and d L / d top

Shape letters: N positions, n positions of a chunk, V vocabulary, D hidden size, K head columns, S loss terms.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.lm_head import (
    ChunkedHead,
    HeadTransform,
    chunk_rows,
    compute_dtype,
    free_bytes,
    scaled_gradients,
)
from student.losses.sparse import ReducedLogits, Reduction, SparseTargets

ReducedLoss = Callable[[ReducedLogits, SparseTargets], Tensor]
Terms = tuple[tuple[ReducedLoss, float], ...]
CHUNK_ELEMENTS = 2**25  # logits held at a time, more on GPUs that have room


@dataclass(frozen=True)
class HeadLoss:
    """Result of `sparse_head_loss`: the differentiable sum, and what is worth knowing about each position.

    total: float scalar, weighted sum over terms and positions. terms_SN: detached values of every term.
    agree_N: bool, the student's most likely token is the teacher's (False where the row has no head).
    """

    total: Tensor
    terms_SN: Tensor
    agree_N: Tensor


def sparse_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    terms: Sequence[tuple[ReducedLoss, float]],
    transform: HeadTransform,
    chunk: int | None = None,
    reduction: Reduction | None = None,
    scale_N: Tensor | None = None,
) -> HeadLoss:
    """Sum over positions and terms of weight * loss(student, teacher), differentiable in hidden, weight and
    bias.

    scale_N: float, what the losses of each position are multiplied by; None: by nothing.

    Gradients are computed during this call, for the inputs that require them, and only scaled in the backward
    pass. `chunk` is the number of positions held at a time (default: CHUNK_ELEMENTS / V, less for further
    temperatures, more on GPUs that have room: see `lm_head.chunk_rows`). `reduction`: what the losses want
    beside head, tail and label.
    """
    reduction = reduction or Reduction()
    temperatures = 1 + len(reduction.tails)
    chunk = chunk or chunk_rows(
        weight_VD.shape,
        itemsize=compute_dtype(hidden_ND).itemsize,
        elements=CHUNK_ELEMENTS // temperatures,
        buffers=temperatures + 1,  # and the slope of soft-capping
        free=free_bytes(hidden_ND.device),
    )
    plan = (tuple(terms), transform, reduction, chunk, scale_N)
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
        plan: tuple[Terms, HeadTransform, Reduction, int, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms, transform, reduction, chunk, scale_N = plan
        head = ChunkedHead(
            hidden_ND=hidden_ND,
            weight_VD=weight_VD,
            bias_V=bias_V,
            transform=transform,
            chunk=chunk,
            needs=ctx.needs_input_grad[:3],
        )
        run = _SparsePass(head, terms, reduction, scale_N)
        for rows in head.chunks():
            run.step(rows, targets.slice(rows.start, rows.stop))
        head.save_gradients(ctx)
        ctx.mark_non_differentiable(run.terms_SN, run.agree_N)
        return run.total(), run.terms_SN, run.agree_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _terms: Tensor, _agree: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_total), None, None)


class _SparsePass:
    """One pass over the chunks: the losses of reduced logits, and their gradients spread over the
    vocabulary.
    """

    def __init__(self, head: ChunkedHead, terms: Terms, reduction: Reduction, scale_N: Tensor | None) -> None:
        self.head, self.terms, self.reduction, self.scale_N = head, terms, reduction, scale_N
        n = len(head.h_ND)
        new = head.h_ND.new_empty
        shape = (head.chunk, len(head.w_VD))
        self.tails = {t: new(shape, dtype=head.exact) for t in reduction.tails}
        self.terms_SN = head.h_ND.new_zeros(len(terms), n, dtype=head.exact)
        self.agree_N = torch.zeros(n, dtype=torch.bool, device=head.h_ND.device)

    def total(self) -> Tensor:
        """Weighted sum of everything, a scalar."""
        total = self.terms_SN.new_zeros(())
        # Number by number: the host waits for a GPU to take a list.
        for (_, weight), value_N in zip(self.terms, self.terms_SN, strict=True):
            total.add_(value_N.sum(), alpha=weight)
        return total

    def step(self, rows: slice, targets: SparseTargets) -> None:
        """Losses of one chunk, and its gradients when somebody wants them."""
        # 1. Logits of the chunk, and the few numbers that losses read: head, label, largest.
        z_nV = self.head.logits(rows)
        n = len(z_nV)
        ids_nK = targets.ids_NK
        real_nK = torch.isfinite(targets.logprob_NK)
        head_nK = z_nV.gather(1, ids_nK).masked_fill_(~real_nK, -math.inf)
        label_n = z_nV.gather(1, targets.label_N.unsqueeze(1)).squeeze(1)
        width = min(max(targets.head_columns, 1), z_nV.shape[1]) if self.reduction.ranked else 0
        top_nK, top_ids_nK = z_nV.topk(width) if width else (z_nV.new_empty(n, 0), ids_nK[:, :0])
        # 2. What is outside the head, as one logsumexp per temperature; its exponentials stay for stage 4.
        z_nV.scatter_(1, ids_nK, -math.inf)
        peak_n = z_nV.amax(-1)
        # A row whose head is the whole vocabulary has no tail: any finite shift keeps exp(-inf) at zero. What
        # the teacher's side gives as its tail there is the rounding of its logsumexp, and no mass.
        targets = replace(targets, tail_N=targets.tail_N.masked_fill(torch.isneginf(peak_n), -math.inf))
        shift_n = torch.where(torch.isfinite(peak_n), peak_n, 0.0)
        z_nV.sub_(shift_n.unsqueeze(1))
        exps = {t: torch.div(z_nV, t, out=buffer[:n]).exp_() for t, buffer in self.tails.items()}
        exps = {1.0: z_nV.exp_(), **exps}
        sums = {t: exp_nV.sum(-1) for t, exp_nV in exps.items()}
        tails = [shift_n / t + sum_n.log() for t, sum_n in sums.items()]
        # 3. The losses, and their gradient with respect to those numbers, by autograd on small tensors.
        slopes = self._losses([head_nK, label_n, top_nK, *tails], targets, rows)
        self.agree_N[rows] = _agreement(head_nK, peak_n)
        if slopes is not None:
            # 4. The gradient of every logit, in the place of the exponentials: see the table above.
            d_head_nK, d_label_n, d_top_nK, *d_tails = slopes
            for (t, exp_nV), d_tail_n in zip(exps.items(), d_tails, strict=True):
                exp_nV.mul_(torch.where(sums[t] > 0, d_tail_n / (sums[t] * t), 0.0).unsqueeze(1))
                if t != 1.0:
                    z_nV.add_(exp_nV)
            # Padding repeats column 0, so it must write that column's value.
            d_head_nK = torch.where(real_nK, d_head_nK, d_head_nK[:, :1])
            extra = [(targets.label_N.unsqueeze(1), d_label_n.unsqueeze(1)), (top_ids_nK, d_top_nK)]
            _spread_(z_nV, (ids_nK, d_head_nK), extra)
            # 5. On to hidden states and weights of the head.
            self.head.add_gradient(rows, z_nV)

    def _losses(self, leaves: list[Tensor], targets: SparseTargets, rows: slice) -> tuple[Tensor, ...] | None:
        """Fill in the terms' values; d total / d leaves, leaves: head, label, top, tails."""
        wants_grad = self.head.wants_grad
        with torch.set_grad_enabled(wants_grad):
            leaves = [leaf.requires_grad_(wants_grad) for leaf in leaves]
            head_nK, label_n, top_nK, tail_n, *others = leaves
            tails = dict(zip(self.reduction.tails, others, strict=True))
            ranked_nK = top_nK if self.reduction.ranked else None
            student = ReducedLogits(
                head_NK=head_nK, tail_N=tail_n, label_N=label_n, tails=tails, top_NK=ranked_nK
            )
            total = tail_n.new_zeros(())
            for index, (loss, weight) in enumerate(self.terms):
                value_n = loss(student, targets)
                if self.scale_N is not None:
                    value_n = value_n * self.scale_N[rows]
                self.terms_SN[index, rows] = value_n.detach()
                if weight:
                    total = total + weight * value_n.sum()
            if not total.requires_grad:
                return None
            return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def _spread_(g_nV: Tensor, head: tuple[Tensor, Tensor], extra: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Complete d total / d logits: `g_nV` holds what the tails give, zero at the head. extra: (columns,
    what to add there).
    """
    # Set, not add, in the exact dtype: bfloat16 scatters and scatter_add_ copy the whole tensor on CPUs.
    g_nV.scatter_(1, *head)
    for ids_nK, d_nK in extra:
        g_nV.scatter_(1, ids_nK, g_nV.gather(1, ids_nK) + d_nK)


def _agreement(head_nK: Tensor, tail_peak_n: Tensor) -> Tensor:
    """Whether the student's largest logit is in column 0 of the head, the teacher's first choice;
    bool [n].
    """
    if head_nK.shape[1] == 0:
        return torch.zeros_like(tail_peak_n, dtype=torch.bool)
    return head_nK[:, 0] >= torch.maximum(head_nK.amax(-1), tail_peak_n)
