"""Losses over the full vocabulary, from the final states of teacher and student and their two heads.

The teacher's logits are recomputed, chunk by chunk, from its cached final state and its LM head, so that the
whole distribution is there at any temperature and neither side's N x V ever exists. Losses and their slopes
come from `student.losses.full`, chunks and gradients from `student.losses.lm_head`.

Shape letters: N positions, n positions of a chunk, V vocabulary of the teacher, D hidden size, S loss terms.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.full import DenseLoss, Rows
from student.losses.lm_head import (
    ChunkedHead,
    HeadTransform,
    Logits,
    chunk_rows,
    compute_dtype,
    exact_dtype,
    free_bytes,
    scaled_gradients,
)
from student.planned import planned_device

# Logits per side and chunk, more on GPUs that have room.
CHUNK_ELEMENTS = 2**24
# Logits per side that a loss sees at a time: on a CPU, for each of its threads, what it makes of them fits a
# cache; a GPU wants fewer launches.
BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**23}
# Weights of the teacher that are cast at a time: what fits the caches of a CPU.
CAST_ELEMENTS = 2**20


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
    def products(self, hidden_nD: Tensor, out_nV: Tensor | None = None) -> Logits:
        """Logits [n, V], products as `compute_dtype` says. out_nV: where to write them, of that dtype."""
        dtype = compute_dtype(hidden_nD)
        h_nD = hidden_nD.to(dtype)
        shape = len(h_nD), len(self.weight_VD)
        raw_nV = h_nD.new_empty(shape) if out_nV is None else out_nV
        for block in self.blocks(dtype):
            torch.mm(h_nD, self.weight_VD[block].to(dtype).t(), out=raw_nV[:, block])
        return Logits(raw_nV, self.bias_V, self.transform)

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Transformed logits [n, V] in float32 (float64 for float64 states)."""
        return self.products(hidden_nD).rows(slice(None))


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
    dtype = compute_dtype(hidden_ND)
    return chunk_rows(
        weight_VD.shape,
        itemsize=dtype.itemsize,
        elements=CHUNK_ELEMENTS,
        buffers=dtype.itemsize / exact_dtype(dtype).itemsize,  # the teacher's product
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
        shape, theirs = (head.chunk, len(weight_VD)), compute_dtype(targets.hidden_ND)
        teacher_nV = targets.hidden_ND.new_empty(shape, dtype=theirs)
        for positions in head.chunks():
            # 1. Both products.
            states_nD, values_Sn = targets.hidden_ND[positions], terms_SN[:, positions]
            student = head.products(positions)
            teacher = targets.head.products(states_nD, teacher_nV[: len(states_nD)])
            # 2. Values and gradient some rows at a time, the gradient in the place of the student's product.
            for chosen in _blocks(student.raw_nV):
                rows = Rows(student.rows(chosen), teacher.rows(chosen))
                gradient = _step(rows, terms, values_Sn[:, chosen])
                if head.wants_grad and gradient is not None:
                    if scale_N is not None:
                        gradient.mul_(scale_N[positions][chosen].unsqueeze(1))
                    head.put_gradient(student, chosen, gradient)
            if scale_N is not None:
                values_Sn *= scale_N[positions]
            # 3. The gradient's own products.
            if head.wants_grad and any(weight for _, weight in terms):
                head.add_products(positions)
        for value_N, (_, weight) in zip(terms_SN, terms, strict=True):
            total.add_(value_N.sum(), alpha=weight)
        head.save_gradients(ctx)
        ctx.mark_non_differentiable(terms_SN)
        return total, terms_SN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _terms: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_total), None, None, None, None, None)


def _blocks(raw_nV: Tensor) -> Iterator[slice]:
    """Rows that the losses see at a time."""
    (n, v), planned = raw_nV.shape, planned_device()
    on_cpu = raw_nV.device.type == "cpu" if planned is None else not planned.free
    if on_cpu:
        step = max(1, BLOCK_ELEMENTS["cpu"] // v) * torch.get_num_threads()
    else:
        step = max(1, BLOCK_ELEMENTS["cuda"] // v)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _step(rows: Rows, terms: Sequence[tuple[DenseLoss, float]], values_Sn: Tensor) -> Tensor | None:
    """Write the values of every term; the weighted sum of their gradients, None where all weights are
    zero.
    """
    total: Tensor | None = None
    for value_n, (loss, weight) in zip(values_Sn, terms, strict=True):
        found_n, gradient = loss(rows)
        value_n.copy_(found_n)
        if weight and total is not None:
            total.add_(gradient, alpha=weight)
        elif weight:
            total = gradient if weight == 1.0 else gradient.mul_(weight)
    return total


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
