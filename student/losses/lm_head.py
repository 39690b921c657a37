"""The LM head in chunks of positions, so that N x V never exists: what the head losses share.

For each chunk of n positions a loss gets the logits, turns them into its gradient at once and hands that
back; dH and dW add up over the chunks and are only scaled in the backward pass. Computing the gradient in the
forward pass is the idea of apple/ml-cross-entropy and the Liger kernels; soft-capping as in Gemma 2
(arXiv:2408.00118).

Shape letters: N positions, n positions of a chunk, V vocabulary, D hidden size.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.planned import planned_device

MOST_ROWS = 2048
_SHARE = 4  # chunks take one part in so many of the free memory: its blocks do not lie together


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

    def apply_(self, z_nV: Tensor) -> Tensor:
        """Transform raw logits in place."""
        if self.scale != 1.0:
            z_nV.mul_(self.scale)
        return z_nV if self.softcap is None else z_nV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z_nV: Tensor) -> Tensor:
        """d z / d raw at transformed logits, [n, V]; without soft-capping one number, expanded."""
        if self.softcap is None:
            return z_nV.new_tensor(self.scale).expand_as(z_nV)
        return (z_nV / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class Logits:
    """Logits of n positions as the product of states and head left them, in the dtype of products [n, V].

    Bias and transform follow in the exact dtype where rows are read, so that no matrix of n x V exists beside
    the product. bias_V: float or None.
    """

    raw_nV: Tensor
    bias_V: Tensor | None
    transform: HeadTransform

    def rows(self, chosen: slice) -> Tensor:
        """Transformed logits of some positions in float32 (float64 for float64 products); to be read only,
        since they may be a view.
        """
        raw_nV = self.raw_nV[chosen]
        exact = exact_dtype(raw_nV.dtype)
        if self.bias_V is None and self.transform == HeadTransform():
            return raw_nV.to(exact)
        z_nV = raw_nV.to(exact, copy=True)
        if self.bias_V is not None:
            z_nV.add_(self.bias_V)
        return self.transform.apply_(z_nV)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of matrix products here: autocast's when it is on for this device, else the dtype of `hidden`."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits and reductions: float32, or float64 where that goes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(shape_VD: Sequence[int], itemsize: int, elements: int, buffers: float, free: int) -> int:
    """Positions to hold at a time.

    Every chunk adds a product of V x D to dW, so on GPUs small ones are slow and those of MOST_ROWS are near
    the best. Where memory allows it, the largest power of two up to that; at least `elements` logits, however
    little is free.

    itemsize: bytes of a number in products. buffers: matrices of chunk x V in the exact dtype, or parts of
    one, beside the student's product. free: bytes, before gradients of the head are there, see `free_bytes`.
    """
    v, d = shape_VD
    least = max(1, elements // v)
    exact = max(4, itemsize)
    left = free - v * d * (exact + itemsize)
    fitting = int(max(0, left // _SHARE) // (v * (itemsize + buffers * exact)))
    return max(least, min(MOST_ROWS, 1 << fitting.bit_length() >> 1))


def free_bytes(device: torch.device) -> int:
    """What a GPU could still hold; 0 for devices on which larger chunks gain nothing."""
    if (planned := planned_device()) is not None:
        return planned.free
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class ChunkedHead:
    """The student's head over N positions: owns the buffers that all chunks share and the gradients that
    they add to.

    `needs` says whether hidden, weight and bias want a gradient. One matrix product's worth of logits is held
    in the compute dtype, and for `logits` one in the exact dtype where the two differ.

    A loss either takes all logits of a chunk (`logits`, then `add_gradient`), or reads some rows at a time
    and puts its gradient in their place (`products`, `put_gradient` for every row, `add_products`).
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        transform: HeadTransform,
        chunk: int,
        needs: Sequence[bool],
    ) -> None:
        dtype = compute_dtype(hidden_ND)
        self.h_ND, self.w_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.transform, self.exact = transform, exact_dtype(dtype)
        self.wants_grad = any(needs)
        self._dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        (n, d), v = self.h_ND.shape, len(self.w_VD)
        self.chunk = max(1, min(chunk, n))
        new = self.h_ND.new_empty
        self._z_nV = new(self.chunk, v)
        self._exact_nV = self._z_nV if dtype == self.exact else None  # made by the first `logits`
        # Zeros, since a pass in which all weights are zero adds nothing.
        self._dh_ND = self.h_ND.new_zeros(n, d) if needs[0] else None
        self._dw_VD = self.h_ND.new_zeros(v, d, dtype=self.exact) if needs[1] else None
        self._part_VD = new(v, d) if needs[1] and dtype != self.exact else None
        self._db_V = self.h_ND.new_zeros(v, dtype=self.exact) if needs[2] else None

    def chunks(self) -> Iterator[slice]:
        """Positions of each chunk."""
        for start in range(0, len(self.h_ND), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.h_ND)))

    def products(self, rows: slice) -> Logits:
        """Logits of a chunk, to be read some rows at a time; a buffer that the next chunk overwrites."""
        h_nD = self.h_ND[rows]
        raw_nV = torch.mm(h_nD, self.w_VD.t(), out=self._z_nV[: len(h_nD)])
        return Logits(raw_nV, self.bias_V, self.transform)

    def put_gradient(self, logits: Logits, chosen: slice, g_nV: Tensor) -> None:
        """Put d total / d logits of some of a chunk's positions, which is overwritten, in the place of their
        product.
        """
        if self.transform != HeadTransform():
            g_nV.mul_(self.transform.slope(logits.rows(chosen)))
        logits.raw_nV[chosen] = g_nV

    def logits(self, rows: slice) -> Tensor:
        """Transformed logits of a chunk in the exact dtype, [n, V].

        They are a buffer that the next chunk overwrites; whoever asks may write into it.
        """
        raw_nV = self.products(rows).raw_nV
        if self._exact_nV is None:
            self._exact_nV = torch.empty_like(self._z_nV, dtype=self.exact)
        z_nV = self._exact_nV[: len(raw_nV)]
        if z_nV.dtype != raw_nV.dtype:
            z_nV.copy_(raw_nV)
        if self.bias_V is not None:
            z_nV.add_(self.bias_V)
        self.transform.apply_(z_nV)
        plain = self.transform == HeadTransform() or not self.wants_grad
        self._slope_nV = None if plain else self.transform.slope(z_nV)
        return z_nV

    def add_gradient(self, rows: slice, g_nV: Tensor) -> None:
        """Add what d total / d logits of the last chunk means for hidden, weight and bias.

        `g_nV` is of the exact dtype, may be the buffer that `logits` gave, and is overwritten.
        """
        # Back through soft-capping and scale, to the raw logits.
        if self._slope_nV is not None:
            g_nV.mul_(self._slope_nV)
        low_nV = self._z_nV[: len(g_nV)]
        self._add(rows, g_nV if g_nV.dtype == low_nV.dtype else low_nV.copy_(g_nV))

    def add_products(self, rows: slice) -> None:
        """The same for the gradient that `put_gradient` has left in every row of the last chunk."""
        self._add(rows, self._z_nV[: rows.stop - rows.start])

    def _add(self, rows: slice, g_nV: Tensor) -> None:
        """Gradient of the raw logits, in the dtype of products, onto those of hidden, weight and bias."""
        # dH is complete for the rows of this chunk; dW and db add up over the chunks, in the exact dtype.
        h_nD = self.h_ND[rows]
        if self._dh_ND is not None:
            torch.mm(g_nV, self.w_VD, out=self._dh_ND[rows])
        if self._dw_VD is not None and self._part_VD is None:
            self._dw_VD.addmm_(g_nV.t(), h_nD)
        elif self._dw_VD is not None:
            self._dw_VD.add_(torch.mm(g_nV.t(), h_nD, out=self._part_VD))
        if self._db_V is not None:
            self._db_V.add_(g_nV.sum(0, dtype=self.exact))

    def save_gradients(self, ctx: Any) -> None:
        """Leave what was added up with an autograd context, for `scaled_gradients`."""
        ctx.grads, ctx.dtypes = (self._dh_ND, self._dw_VD, self._db_V), self._dtypes


def scaled_gradients(ctx: Any, grad_total: Tensor) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias in their own dtypes; once only, since they are scaled in place."""
    if ctx.grads is None:
        raise RuntimeError(
            "the fused head cannot be differentiated a second time: it scales its gradients in place"
        )
    grads = [
        None if grad is None else grad.mul_(grad_total).to(dtype)
        for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
    ]
    ctx.grads = None
    return grads
