"""One quantisation per input: query, key and value projections are given the same tensor, and so are gate and
up.

Shape letters: N tokens, I input features.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from student.bitnet.chains import chains


@dataclass
class Quantised:
    """An input [..., I] in int8 [N, I], and the inverse of its scale, float32 [N, 1]."""

    ints_NI: Tensor
    inverse_N1: Tensor
    _factors: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The integers as floating-point numbers, for products of such."""
        if dtype not in self._factors:
            self._factors[dtype] = self.ints_NI.to(dtype)
        return self._factors[dtype]


@dataclass(frozen=True)
class _Last:
    input: weakref.ref[Tensor]
    version: int
    quantised: Quantised
    readers: set[int]  # ids of those that were given it


class SharedInputs:
    """Quantises inputs, and gives what it made last to further readers of the same tensor.

    Not twice to one reader: whoever comes again is in another forward pass, and a buffer may have been filled
    anew in between without autograd's counting it. What was made goes when its input does.
    """

    def __init__(self) -> None:
        self._last: _Last | None = None

    def quantised(self, x: Tensor, reader: object, dtype: torch.dtype | None = None) -> Quantised:
        """Of an input [..., I] of any float dtype. dtype: whose `factor` will be asked for."""
        if torch.compiler.is_compiling() or x.is_inference():  # such tensors have no version
            return _quantise(x, dtype)
        last = self._last  # other threads may replace it
        if last is None or last.input() is not x or last.version != x._version or id(reader) in last.readers:
            last = _Last(weakref.ref(x, self._forget), x._version, _quantise(x, dtype), set())
            self._last = last
        last.readers.add(id(reader))
        return last.quantised

    def _forget(self, input: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last.input is input:
            self._last = None


@torch.no_grad()
def _quantise(x: Tensor, dtype: torch.dtype | None) -> Quantised:
    ints_NI, inverse_N1, factor_NI = chains(x).quantize_rows(x.reshape(-1, x.shape[-1]), dtype)
    factors = {} if dtype is None or factor_NI is None else {dtype: factor_NI}
    return Quantised(ints_NI, inverse_N1, factors)
