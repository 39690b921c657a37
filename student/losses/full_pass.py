"""Losses over the full vocabulary, from the final states of teacher and student and their two heads.

The teacher's logits are recomputed, chunk by chunk, from its cached final state and its LM head, so that the
whole distribution is there at any temperature and neither side's N x V ever exists. Losses and their slopes
come from `student.losses.full`, chunks and gradients from `student.losses.lm_head`.

Shape letters: N positions, n positions of a chunk, V vocabulary of the teacher, D hidden size, S loss terms.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.full import DenseLoss, Rows
from student.losses.lm_head import (
    ChunkedHead,
    HeadTransform,
    chunk_rows,
    compute_dtype,
    exact_dtype,
    free_bytes,
    scaled_gradients,
)

# Logits per buffer, more on GPUs that have room, and buffers that live at a time: both sides' logits, the
# slope of soft-capping, the gradient, and a product of the teacher's head.
CHUNK_ELEMENTS = 2**24
_BUFFERS = 5
# Weights of the teacher that are cast at a time.
CAST_ELEMENTS = 2**22


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's LM head, frozen, in the dtype in which it was stored; never copied as a whole.

    weight_VD: float. bias_V: float or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    transform: HeadTransform

    def blocks(self, dtype: torch.dtype) -> list[slice]:
        """Slices of the vocabulary to cast one by one; one slice where nothing is cast."""
        v, d = self.weight_VD.shape
        step = v if self.weight_VD.dtype == dtype else max(1, CAST_ELEMENTS // d)
        return [slice(start, min(start + step, v)) for start in range(0, v, step)]

    @torch.no_grad()
    def logits(self, hidden_nD: Tensor, out_nV: Tensor | None = None) -> Tensor:
        """Transformed logits [n, V] in float32 (float64 for float64 states); products as `compute_dtype`
        says. out_nV: where to write them.
        """
        dtype = compute_dtype(hidden_nD)
        h_nD = hidden_nD.to(dtype)
        shape = len(h_nD), len(self.weight_VD)
        z_nV = h_nD.new_empty(shape, dtype=exact_dtype(dtype)) if out_nV is None else out_nV
        for block in self.blocks(dtype):
            z_nV[:, block] = h_nD @ self.weight_VD[block].to(dtype).t()
        if self.bias_V is not None:
            z_nV.add_(self.bias_V)
        return self.transform.apply_(z_nV)


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's side of N positions; hidden_ND: float, states behind the final norm."""

    head: TeacherHead
    hidden_ND: Tensor


def dense_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: DenseTargets,
    terms: Sequence[tuple[DenseLoss, float]],
    transform: HeadTransform,
    chunk: int | None = None,
    scale_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum over positions and terms of weight * loss, detached values of every term [S, N]).

    The sum is differentiable in the student's hidden, weight and bias; gradients are computed during this
    call and only scaled in the backward pass. A student whose head has more rows than the teacher's (padding)
    is compared over the teacher's vocabulary. `chunk` is the number of positions held at a time (default:
    CHUNK_ELEMENTS / V, more on GPUs that have room). scale_N: float, what the losses of each position are
    multiplied by; None: by nothing. ValueError when the teacher's vocabulary is the larger one.
    """
    v = len(targets.head.weight_VD)
    if len(weight_VD) < v:
        raise ValueError(f"the student's head has {len(weight_VD)} tokens, the teacher's {v}")
    if len(weight_VD) > v:
        weight_VD, bias_V = weight_VD[:v], None if bias_V is None else bias_V[:v]
    chunk = chunk or _rows(hidden_ND, weight_VD)
    out: tuple[Tensor, Tensor] = _DenseHead.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets, tuple(terms), transform, chunk, scale_N
    )
    return out


def _rows(hidden_ND: Tensor, weight_VD: Tensor) -> int:
    return chunk_rows(
        weight_VD.shape,
        itemsize=compute_dtype(hidden_ND).itemsize,
        elements=CHUNK_ELEMENTS,
        buffers=_BUFFERS,
        free=free_bytes(hidden_ND.device),
    )


class _DenseHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: DenseTargets,
        terms: tuple[tuple[DenseLoss, float], ...],
        transform: HeadTransform,
        chunk: int,
        scale_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(
            hidden_ND=hidden_ND,
            weight_VD=weight_VD,
            bias_V=bias_V,
            transform=transform,
            chunk=chunk,
            needs=ctx.needs_input_grad[:3],
        )
        terms_SN = hidden_ND.new_zeros(len(terms), len(hidden_ND), dtype=head.exact)
        total = terms_SN.new_zeros(())
        teacher_nV = terms_SN.new_empty(head.chunk, len(weight_VD))
        gradient_nV = torch.empty_like(teacher_nV) if head.wants_grad else None
        for positions in head.chunks():
            student_nV = head.logits(positions)
            n = len(student_nV)
            rows = Rows(
                student_nV,
                targets.head.logits(targets.hidden_ND[positions], teacher_nV[:n]),
                None if gradient_nV is None else gradient_nV[:n].zero_(),
            )
            for index, (loss, weight) in enumerate(terms):
                terms_SN[index, positions] = loss(rows, weight)
                if scale_N is not None:
                    terms_SN[index, positions] *= scale_N[positions]
                total += weight * terms_SN[index, positions].sum()
            if rows.gradient_nV is not None:
                if scale_N is not None:
                    rows.gradient_nV.mul_(scale_N[positions].unsqueeze(1))
                head.add_gradient(positions, rows.gradient_nV)
        head.save_gradients(ctx)
        ctx.mark_non_differentiable(terms_SN)
        return total, terms_SN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _terms: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_total), None, None, None, None, None)


@torch.no_grad()
def fisher_diagonal(targets: DenseTargets, chunk: int | None = None) -> Tensor:
    """Diagonal of the Fisher information of the teacher's final states, [N, D], float32.

    F_d = sum over y of p(y) * (d log p(y) / d h_d)^2, the expected squared gradient of the teacher's own
    predictions; with J = scale * (d z / d raw) * W this is the variance of J_yd when y is drawn from p.
    """
    head = targets.head
    d = head.weight_VD.shape[1]
    chunk = chunk or _rows(targets.hidden_ND, head.weight_VD)
    exact = exact_dtype(targets.hidden_ND.dtype)
    fisher_ND = targets.hidden_ND.new_zeros(len(targets.hidden_ND), d, dtype=exact)
    for start in range(0, len(fisher_ND), chunk):
        z_nV = head.logits(targets.hidden_ND[start : start + chunk]).to(exact)
        p_nV = z_nV.softmax(-1)
        slope_nV = head.transform.slope(z_nV)
        square_nD, mean_nD = fisher_ND[start : start + chunk], fisher_ND.new_zeros(len(z_nV), d)
        for block in head.blocks(exact):
            w_VD, slope = head.weight_VD[block].to(exact), slope_nV[:, block]
            mean_nD.addmm_(p_nV[:, block] * slope, w_VD)
            square_nD.addmm_(p_nV[:, block] * slope.square(), w_VD.square())
        square_nD.sub_(mean_nD.square_()).clamp_(min=0.0)  # rounding may leave less than none
    return fisher_ND


def fisher_mse(student_ND: Tensor, teacher_ND: Tensor, fisher_ND: Tensor) -> Tensor:
    """sum over D of F_d (student_d - teacher_d)^2 / 2 for final states of one width, in nats, [N].

    "Features weighted by gradients" of Hsu et al. 2022 (LKD-G, arXiv:2203.10163): to second order, and with F
    reduced to its diagonal, the KL that the difference of features would cause behind the teacher's own head.
    """
    return (fisher_ND * (student_ND.float() - teacher_ND.float()).square()).sum(-1) / 2
