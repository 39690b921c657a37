"""Matrix products of int8 values, exact to the last unit, by the integer units of the device that has them.

torch._int_mm runs them on tensor cores and on CPUs with VNNI, there at twice the speed of bfloat16. Its rules
are private to the device, and on some CPUs it is wrong: everything about that is in here.

Shape letters: [M, K] @ [K, N].
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from student.planned import planned_device

_OVERFLOW = 2**31 // 128**2  # products of two int8 values that surely fit an int32 sum


def int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Sums of products of int8 values of any strides: int32 [M, N], or float32 where `is_integer` says no.

    float32 sums are exact, too, below 2^24: that is up to K = 1,024 of any int8 values, and up to K = 131,072
    where one side is ternary.
    """
    kind, (rows, inner), columns = a_MK.device.type, a_MK.shape, b_KN.shape[1]
    if not is_integer(kind, rows, inner, columns):
        with torch.autocast(kind, enabled=False):
            return torch.mm(a_MK.float(), b_KN.float())
    if kind == "cuda":
        a_MK, b_KN = aligned(a_MK, b_KN)
    elif rows == 1:  # of strides that no transposed matrix has
        a_MK = a_MK.flatten()[None]
    return torch._int_mm(a_MK, b_KN)[:, :columns]


def is_integer(kind: str, rows: int, inner: int, columns: int) -> bool:
    """Whether `int_mm` multiplies integers for this device type and these sizes; torch.compile makes kernels
    of its own from floating-point products.
    """
    if torch.compiler.is_compiling() or not suits(kind, rows, inner, columns):
        return False
    planned = planned_device()
    return works(kind) if planned is None else planned.integers


def suits(kind: str, rows: int, inner: int, columns: int) -> bool:
    """Whether torch._int_mm may be asked: CUDA wants more than 16 rows, the rest is padded; on CPUs, a
    transposed matrix whose rows or columns are single numbers is mistaken for one that is not.
    """
    if inner > _OVERFLOW:
        return False
    return rows > 16 if kind == "cuda" else kind == "cpu" and inner > 1


def aligned(a_MK: Tensor, b_KN: Tensor) -> tuple[Tensor, Tensor]:
    """The same product as cuBLAS takes it: K and N padded with zeros to multiples of 8, both matrices with
    their K lying together.
    """
    inner, columns = -a_MK.shape[1] % 8, -b_KN.shape[1] % 8
    b_NK = b_KN.t()
    if inner:
        a_MK = functional.pad(a_MK, (0, inner))
    if inner or columns:
        b_NK = functional.pad(b_NK, (0, inner, 0, columns))
    return a_MK.contiguous(), b_NK.contiguous().t()


@cache
def works(kind: str) -> bool:
    """Whether torch._int_mm is there on this machine's device, fast, and right at the largest values.

    CPUs without VNNI add pairs of products in 16 bits, which saturate.
    """
    if kind == "cpu" and not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((32, 32), 127, dtype=torch.int8, device=kind)
    try:
        return bool((torch._int_mm(largest, largest.t()) == 32 * 127**2).all())
    except RuntimeError:  # a GPU that cannot
        return False
