"""Attention distributions and relations of queries, keys and values, compared row by row.

Row t of a relation is softmax over s <= t of the scaled products of vector t with vectors s: of queries with
keys (the attention itself), or of queries, keys or values among themselves. Its size does not depend on any
width, so that teacher and student may differ in all but the number of relation heads. Rows are computed some
at a time, forward and again backward, so that no T x T of all heads ever exists.

Shape letters: B batch, T positions, A relation heads, d width of one of them, H query heads, G key heads.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.losses.lm_head import compute_dtype, exact_dtype

# Scores per buffer; about five live at a time.
CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Scoring:
    """From products to scores: z = scale * product, then softcap * tanh(z / softcap)."""

    scale: float
    softcap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """In place."""
        z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def pull_(self, slope: Tensor, z: Tensor) -> Tensor:
        """d / d scores into d / d products, in place; z holds the scores and is overwritten."""
        slope.mul_(self.scale)
        return slope if self.softcap is None else slope.mul_(z.div_(self.softcap).square_().neg_().add_(1.0))


@dataclass(frozen=True)
class Vectors:
    """One side of a relation: rows [B, A, T, d], what they are multiplied with [B, A, T, d], and how."""

    rows: Tensor
    columns: Tensor
    scoring: Scoring

    @classmethod
    def among_themselves(cls, x_BTHd: Tensor, heads: int) -> Vectors:
        """The relation of vectors with each other, scaled by 1 / sqrt(width) (MiniLMv2, arXiv:2012.15828)."""
        x_BATd = relation_heads(x_BTHd, heads)
        return cls(x_BATd, x_BATd, Scoring(x_BATd.shape[-1] ** -0.5))


def relation_heads(x_BTHd: Tensor, heads: int) -> Tensor:
    """The heads' vectors laid side by side and split anew, [B, A, T, H d / A]; ValueError where that is not
    even.
    """
    width = x_BTHd.shape[2] * x_BTHd.shape[3]
    if width % heads:
        raise ValueError(f"vectors of {width} numbers cannot be split into {heads} relation heads")
    return x_BTHd.reshape(*x_BTHd.shape[:2], heads, width // heads).transpose(1, 2)


def relation_kl(
    student: Vectors,
    teacher: Vectors,
    window: int | None = None,
    documents_BT: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(teacher's row || student's row), mean over heads, in nats, [B, T]; differentiable in the student's
    vectors.

    Columns: the row's own position and those before it, the last `window` of them, and of the same document
    where `documents_BT` (int64) tells documents apart. Padding on the right is seen by padding only. `chunk`
    is the number of rows held at a time (default: CHUNK_ELEMENTS / (A T)). ValueError when the sides differ
    in B, A or T.
    """
    sizes = [tuple(side.rows.shape[:3]) for side in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"relations of (batch, heads, positions) {sizes[0]} and {sizes[1]} cannot be compared"
        )
    heads, length = student.rows.shape[1:3]
    chunk = chunk or max(1, CHUNK_ELEMENTS // max(1, heads * length))
    plan = _Plan(
        student=student.scoring,
        teacher=teacher.scoring,
        window=window,
        documents_BT=documents_BT,
        chunk=chunk,
    )
    sides = (student.rows, student.columns, teacher.rows, teacher.columns)
    value_BT: Tensor = _RelationKL.apply(*sides, plan)  # type: ignore[no-untyped-call]
    return value_BT


@dataclass(frozen=True, kw_only=True)
class _Plan:
    student: Scoring
    teacher: Scoring
    window: int | None
    documents_BT: Tensor | None
    chunk: int

    def blocks(self, batch: int, length: int) -> Iterator[tuple[int, slice, slice]]:
        """(sample, rows, columns that they may see) until every row was named once."""
        for sample in range(batch):
            for start in range(0, length, self.chunk):
                stop = min(start + self.chunk, length)
                first = 0 if self.window is None else max(0, start - self.window + 1)
                yield sample, slice(start, stop), slice(first, stop)

    def hidden(self, sample: int, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """What rows must not see, bool [rows, columns]."""
        t = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
        s = torch.arange(columns.start, columns.stop, device=device)
        hidden = s > t
        if self.window is not None:
            hidden |= s <= t - self.window
        if self.documents_BT is not None:
            hidden |= self.documents_BT[sample, rows].unsqueeze(1) != self.documents_BT[sample, columns]
        return hidden


class _RelationKL(torch.autograd.Function):
    """Rows are computed once forward and once more backward; nothing but the vectors is kept in between."""

    @staticmethod
    def forward(
        ctx: Any, rows_s: Tensor, columns_s: Tensor, rows_t: Tensor, columns_t: Tensor, plan: _Plan
    ) -> Tensor:
        dtype = compute_dtype(rows_s)
        sides = [side.detach().to(dtype) for side in (rows_s, columns_s, rows_t, columns_t)]
        batch, _, length, _ = rows_s.shape
        value_BT = rows_s.new_zeros(batch, length, dtype=exact_dtype(dtype))
        for sample, rows, columns in plan.blocks(batch, length):
            log_p, log_q, _ = _distributions(sides, plan, sample, rows, columns)
            log_q.sub_(log_p).neg_()  # log p / q
            value_BT[sample, rows] = log_p.exp_().mul_(log_q).sum(-1).mean(0)
        ctx.save_for_backward(*sides)
        ctx.plan, ctx.dtypes = plan, (rows_s.dtype, columns_s.dtype)
        return value_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:
        sides, plan = list(ctx.saved_tensors), ctx.plan
        rows_BATd, columns_BATd = sides[:2]
        d_rows, d_columns = (torch.zeros_like(side, dtype=grad_BT.dtype) for side in sides[:2])
        batch, heads, length, _ = rows_BATd.shape
        for sample, rows, columns in plan.blocks(batch, length):
            log_p, log_q, z = _distributions(sides, plan, sample, rows, columns)
            slope = log_q.exp_().sub_(log_p.exp_()).mul_(grad_BT[sample, rows].unsqueeze(-1) / heads)
            slope = plan.student.pull_(slope, z).to(rows_BATd.dtype)
            d_rows[sample, :, rows] = slope @ columns_BATd[sample, :, columns]
            d_columns[sample, :, columns] += slope.mT @ rows_BATd[sample, :, rows]
        return d_rows.to(ctx.dtypes[0]), d_columns.to(ctx.dtypes[1]), None, None, None


# Score of a column that a row must not see: no softmax gives it anything, and differences of it are finite.
_UNSEEN = -1e30


def _distributions(
    sides: list[Tensor], plan: _Plan, sample: int, rows: slice, columns: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher's and student's log-probabilities of a block, and the student's scores, each [A, t, s].

    Unseen columns hold the same number on both sides: far below any logarithm of a probability.
    """
    hidden = plan.hidden(sample, rows, columns, sides[0].device)
    logs = []
    for side, scoring in ((2, plan.teacher), (0, plan.student)):
        product = sides[side][sample, :, rows] @ sides[side + 1][sample, :, columns].mT
        z = scoring.apply_(product.to(exact_dtype(product.dtype)))
        logs.append(z.masked_fill(hidden, _UNSEEN).log_softmax(-1).masked_fill_(hidden, _UNSEEN))
    return logs[0], logs[1], z


def attention_output(
    query_BTHd: Tensor,
    key_BTGd: Tensor,
    value_BTGd: Tensor,
    scale: float,
    window: int | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Every head's weighted mean of values, side by side, [B, T, H d]; H / G query heads share a key head."""
    groups = query_BTHd.shape[2] // key_BTGd.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query_BTHd, key_BTGd, value_BTGd))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mask = None
    if window is not None or documents_BT is not None:
        length = q.shape[2]
        plan = _Plan(
            student=Scoring(1.0), teacher=Scoring(1.0), window=window, documents_BT=documents_BT, chunk=length
        )
        whole = slice(0, length)
        mask = torch.stack([~plan.hidden(sample, whole, whole, q.device) for sample in range(len(q))])
        mask = mask.unsqueeze(1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out.transpose(1, 2).flatten(2)
