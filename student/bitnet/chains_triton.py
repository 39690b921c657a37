"""The chains of chains.py on a GPU: a Triton kernel for each, which reads what it is given once.

chains.py is the reference and what CPUs run. Arithmetic is that of the reference, operation by operation:
divisions are rounded as IEEE says, and no product is fused with a sum, so that results have the same bits.
The mean of a weight's absolute values is the exception, whose sum has another order, though always the same
one: no two programs write the same number.

Nothing here was run on a GPU by us. The kernels are tested in Triton's interpreter, and compiled for GPUs:
their arithmetic is known, their speed is not.

Shape letters: N tokens, I input features, O output features, P parts of a sum.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from student.bitnet.chains import TINY, Chains
from student.bitnet.quantizers import EPSILON, LEVELS

# Sizes of tiles are not tuned, for want of a GPU.
TILE = 4096  # weights of a program at once
PARTS = 256  # programs at most that add up a weight
HEIGHT, WIDTH = 64, 64  # tokens and outputs of a tile of gradients
_WIDEST = 4096  # columns of a program, where a row may be cut
_ROUNDING = tl.constexpr(1.5 * 2**23)  # next to it float32 numbers are integers
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EPSILON, _TINY = tl.constexpr(EPSILON), tl.constexpr(TINY)
_LEVELS, _STEP = tl.constexpr(float(LEVELS)), tl.constexpr(1 / LEVELS)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def _largest(values, axis: tl.constexpr):
    """Of absolute values along an axis; NaN where there is one.

    As integers, magnitudes keep their order, and NaN is above all of them.
    """
    return tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def _rounded(values):
    """To the nearest integer, ties to even, of values below 2^22."""
    return (values + _ROUNDING) - _ROUNDING


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def quantize_rows_kernel(
    x_NI, ints_NI, inverse_N, factor_NI, row_stride, columns, COLUMNS: tl.constexpr, FACTOR: tl.constexpr
):
    """One program per token, which holds its row."""
    row = tl.program_id(0).to(tl.int64)
    column_I = tl.arange(0, COLUMNS)
    inside_I = column_I < columns
    x_I = tl.load(x_NI + row * row_stride + column_I, mask=inside_I, other=0.0).to(tl.float32)
    largest = _largest(x_I, 0)
    inverse = tl.div_rn(1.0, tl.where(largest < _EPSILON, _EPSILON, largest)) * _LEVELS
    rounded_I = _rounded(x_I * inverse)
    tl.store(ints_NI + row * columns + column_I, rounded_I.to(tl.int8), mask=inside_I)
    if FACTOR:
        tl.store(factor_NI + row * columns + column_I, rounded_I, mask=inside_I)
    tl.store(inverse_N + row, inverse)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def sum_kernel(weight, sums_P, size, tiles, TILE: tl.constexpr):
    """Absolute values of as many tiles for each program."""
    part = tl.program_id(0).to(tl.int64)
    sum_T = tl.zeros([TILE], tl.float32)
    for tile in range(tiles):
        at_T = (part * tiles + tile) * TILE + tl.arange(0, TILE)
        sum_T += tl.abs(tl.load(weight + at_T, mask=at_T < size, other=0.0).to(tl.float32))
    tl.store(sums_P + part, tl.sum(sum_T, 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def ternary_kernel(weight, sums_P, ternary, scale, size, parts, PARTS: tl.constexpr, TILE: tl.constexpr):
    """One program per tile; each adds up the parts of the sum in the same order."""
    part_P = tl.arange(0, PARTS)
    sum_P = tl.load(sums_P + part_P, mask=part_P < parts, other=0.0)
    mean = tl.div_rn(tl.sum(sum_P, 0), size + 0.0)
    inverse = tl.div_rn(1.0, tl.where(mean < _EPSILON, _EPSILON, mean))
    at_T = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value_T = tl.load(weight + at_T, mask=at_T < size, other=0.0).to(tl.float32) * inverse
    # Rounded and clamped: a half is even as 0.
    ternary_T = (value_T > 0.5).to(tl.int8) - (value_T < -0.5).to(tl.int8)
    tl.store(ternary + at_T, ternary_T, mask=at_T < size)
    if tl.program_id(0) == 0:
        tl.store(scale, tl.div_rn(1.0, inverse))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def rescale_kernel(
    sums_NO, inverse_N, scale, bias_O, y_NO, row_stride, columns, COLUMNS: tl.constexpr, BIAS: tl.constexpr
):
    """One program per token and COLUMNS outputs."""
    row, column_O = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_O = column_O < columns
    inverse = tl.load(inverse_N + row) * tl.div_rn(1.0, tl.load(scale))
    sums_O = tl.load(sums_NO + row * row_stride + column_O, mask=inside_O, other=0).to(tl.float32)
    y_O = tl.div_rn(sums_O, inverse)
    if BIAS:
        y_O += tl.load(bias_O + column_O, mask=inside_O, other=0.0).to(tl.float32)
    tl.store(y_NO + row * columns + column_O, y_O, mask=inside_O)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def blend_kernel(
    full,
    ints,
    scales,
    blended,
    bias,
    low_bias,
    strength,
    row_stride,
    columns,
    COLUMNS: tl.constexpr,
    INVERSE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program per row and COLUMNS of its values. scales: INVERSE ones of rows, or the one of a weight,
    whose bias, a number for each row, is converted with it.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    own = tl.load(full + row * row_stride + column, mask=inside, other=0.0)
    scale = tl.div_rn(1.0, tl.load(scales + row)) if INVERSE else tl.load(scales)
    quantized = tl.load(ints + row * columns + column, mask=inside, other=0).to(tl.float32) * scale
    step = (strength * (quantized - own.to(tl.float32))).to(own.dtype)
    value = (own.to(tl.float32) + step.to(tl.float32)).to(own.dtype)
    tl.store(blended + row * columns + column, value.to(tl.float32), mask=inside)
    if BIAS:
        tl.store(low_bias + row, tl.load(bias + row).to(tl.float32), mask=tl.program_id(1) == 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def scale_product_kernel(product, scale, scaled, size, TILE: tl.constexpr):
    """Rounded to the type of the product first."""
    at_T = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    product_T = tl.load(product + at_T, mask=at_T < size, other=0.0)
    value_T = (product_T.to(tl.float32) * tl.load(scale)).to(product_T.dtype)
    tl.store(scaled + at_T, value_T.to(tl.float32), mask=at_T < size)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def scale_rows_kernel(grad_NO, inverse_N, scaled_NO, row_stride, columns, COLUMNS: tl.constexpr):
    """One program per token and COLUMNS outputs."""
    row, column_O = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_O = column_O < columns
    grad_O = tl.load(grad_NO + row * row_stride + column_O, mask=inside_O, other=0.0).to(tl.float32)
    scaled_O = grad_O * tl.div_rn(1.0, tl.load(inverse_N + row))
    tl.store(scaled_NO + row * columns + column_O, scaled_O, mask=inside_O)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def gradient_rows_kernel(grad_NO, ints_NO, scale_N, row_stride, columns, COLUMNS: tl.constexpr):
    """One program per token, which holds its row."""
    row = tl.program_id(0).to(tl.int64)
    column_O = tl.arange(0, COLUMNS)
    inside_O = column_O < columns
    grad_O = tl.load(grad_NO + row * row_stride + column_O, mask=inside_O, other=0.0).to(tl.float32)
    largest = _largest(grad_O, 0)
    scale = tl.where(largest < _TINY, _TINY, largest) * _STEP
    ints_O = _rounded(tl.div_rn(grad_O, scale)).to(tl.int8)
    tl.store(ints_NO + row * columns + column_O, ints_O, mask=inside_O)
    tl.store(scale_N + row, scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def _scaled_tile(grad_NO, inverse_N, row_N, column_O, rows, columns, row_stride):
    """A tile of gradients times the scales of their tokens, float32."""
    inside_N = row_N < rows
    inside_NO = inside_N[:, None] & (column_O < columns)[None, :]
    address_NO = grad_NO + row_N.to(tl.int64)[:, None] * row_stride + column_O[None, :]
    grad_TT = tl.load(address_NO, mask=inside_NO, other=0.0).to(tl.float32)
    return grad_TT * tl.div_rn(1.0, tl.load(inverse_N + row_N, mask=inside_N, other=1.0))[:, None]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def column_maxima_kernel(
    grad_NO, inverse_N, maxima_PO, rows, columns, row_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """One program per tile, which writes the largest magnitude of each of its columns."""
    part, first = tl.program_id(0), tl.program_id(1) * WIDTH
    row_N, column_O = part * HEIGHT + tl.arange(0, HEIGHT), first + tl.arange(0, WIDTH)
    tile_NO = _scaled_tile(grad_NO, inverse_N, row_N, column_O, rows, columns, row_stride)
    tl.store(maxima_PO + part * columns + column_O, _largest(tile_NO, 0), mask=column_O < columns)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def gradient_columns_kernel(
    grad_NO,
    inverse_N,
    maxima_PO,
    ints_ON,
    scale_O,
    rows,
    columns,
    row_stride,
    parts,
    PARTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per tile. Its integers are written column by column, as an integer product reads them."""
    row_N = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column_O, part_P = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, PARTS)
    inside_O = column_O < columns
    address_PO = maxima_PO + part_P[:, None] * columns + column_O[None, :]
    largest_O = _largest(
        tl.load(address_PO, mask=(part_P < parts)[:, None] & inside_O[None, :], other=0.0), 0
    )
    own_O = tl.where(largest_O < _TINY, _TINY, largest_O) * _STEP
    tile_NO = _scaled_tile(grad_NO, inverse_N, row_N, column_O, rows, columns, row_stride)
    ints_TT = _rounded(tl.div_rn(tile_NO, own_O[None, :])).to(tl.int8)
    address_ON = ints_ON + column_O.to(tl.int64)[None, :] * rows + row_N[:, None]
    tl.store(address_ON, ints_TT, mask=(row_N < rows)[:, None] & inside_O[None, :])
    tl.store(scale_O + column_O, own_O, mask=inside_O & (tl.program_id(0) == 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
@no_type_check
def rescale_gradient_kernel(
    sums_NI, grad_scale_N, scale, grad_NI, row_stride, columns, COLUMNS: tl.constexpr
):
    """One program per token and COLUMNS inputs."""
    row, column_I = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_I = column_I < columns
    sums_I = tl.load(sums_NI + row * row_stride + column_I, mask=inside_I, other=0).to(tl.float32)
    grad_I = sums_I * (tl.load(grad_scale_N + row) * tl.load(scale))
    tl.store(grad_NI + row * columns + column_I, grad_I, mask=inside_I)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """One launch, on the device of the first argument; none for an expert without tokens."""
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _in_rows(x: Tensor) -> Tensor:
    """A matrix whose rows lie together."""
    return x if x.stride(1) == 1 else x.contiguous()


def _whole(columns: int) -> dict[str, int]:
    """Of a program that holds a row."""
    width = triton.next_power_of_2(columns)
    return {"COLUMNS": width, "num_warps": min(max(width // 512, 1), 32)}


def _cut(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of programs that each have a part of a row."""
    width = min(triton.next_power_of_2(columns), _WIDEST)
    return (rows, triton.cdiv(columns, width)), {"COLUMNS": width, "num_warps": max(width // 512, 1)}


def _quantize_rows(x_NI: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x_NI = _in_rows(x_NI.detach())
    ints_NI, inverse_N1 = _empty(x_NI, *x_NI.shape, dtype=torch.int8), _empty(x_NI, len(x_NI), 1)
    factor_NI = None if dtype is None else _empty(x_NI, *x_NI.shape, dtype=dtype)
    columns = x_NI.shape[1]
    sizes = {"FACTOR": factor_NI is not None} | _whole(columns)
    operands = (x_NI, ints_NI, inverse_N1, inverse_N1 if factor_NI is None else factor_NI)
    launch(quantize_rows_kernel, (len(x_NI),), *operands, x_NI.stride(0), columns, **sizes)
    return ints_NI, inverse_N1, factor_NI


def _quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    weight_OI = weight_OI.detach().contiguous()
    size = weight_OI.numel()
    tiles = triton.cdiv(size, TILE)
    each = triton.cdiv(tiles, PARTS)
    parts = triton.cdiv(tiles, each)
    sums_P, scale = _empty(weight_OI, parts), _empty(weight_OI)
    ternary_OI = _empty(weight_OI, *weight_OI.shape, dtype=torch.int8)
    sizes = {"TILE": TILE, "num_warps": 8}
    launch(sum_kernel, (parts,), weight_OI, sums_P, size, each, **sizes)
    operands = (weight_OI, sums_P, ternary_OI, scale, size, parts)
    launch(ternary_kernel, (tiles,), *operands, PARTS=PARTS, **sizes)
    return ternary_OI, scale


def _rescale(
    sums_NO: Tensor, inverse_N1: Tensor, weight_scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, columns = sums_NO.shape
    whole = sums_NO.dtype == dtype and sums_NO.is_contiguous()
    y_NO = sums_NO if whole else _empty(sums_NO, rows, columns, dtype=dtype)
    grid, sizes = _cut(rows, columns)
    operands = (sums_NO, inverse_N1, weight_scale, weight_scale if bias_O is None else bias_O, y_NO)
    launch(rescale_kernel, grid, *operands, sums_NO.stride(0), columns, BIAS=bias_O is not None, **sizes)
    return y_NO


class _Blend(torch.autograd.Function):
    """Straight through: the gradient of the full-precision values."""

    @staticmethod
    def forward(
        ctx: Any,
        full: Tensor,
        ints: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        inverse: bool,
        strength: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.dtypes = full.dtype, None if bias is None else bias.dtype
        full = _in_rows(full)
        rows, columns = full.shape
        blended = _empty(full, rows, columns, dtype=dtype)
        low_bias = None if bias is None else _empty(full, rows, dtype=dtype)
        grid, sizes = _cut(rows, columns)
        biases = (scales, scales) if bias is None else (bias, low_bias)
        operands = (full, ints, scales, blended, *biases, strength, full.stride(0), columns)
        launch(blend_kernel, grid, *operands, INVERSE=inverse, BIAS=bias is not None, **sizes)
        return blended, low_bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        dtype, bias_dtype = ctx.dtypes
        own_bias = None if bias_dtype is None or grad_bias is None else grad_bias.to(bias_dtype)
        return grad.to(dtype), None, None, own_bias, None, None, None


def _blend_rows(
    x_NI: Tensor, ints_NI: Tensor, inverse_N1: Tensor, strength: float, dtype: torch.dtype
) -> Tensor:
    blended_NI: Tensor = _Blend.apply(x_NI, ints_NI, inverse_N1, None, True, strength, dtype)[0]  # type: ignore[no-untyped-call]
    return blended_NI


def _blend_weight(
    weight_OI: Tensor,
    ternary_OI: Tensor,
    scale: Tensor,
    bias_O: Tensor | None,
    strength: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    converted_O = None if bias_O is None or bias_O.dtype == dtype else bias_O
    blended_OI, low_O = _Blend.apply(weight_OI, ternary_OI, scale, converted_O, False, strength, dtype)  # type: ignore[no-untyped-call]
    return blended_OI, bias_O if converted_O is None else low_O


def _scale_product(product_NI: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    scaled_NI = (
        product_NI if product_NI.dtype == dtype else _empty(product_NI, *product_NI.shape, dtype=dtype)
    )
    size = product_NI.numel()
    operands = (product_NI, weight_scale, scaled_NI, size)
    launch(scale_product_kernel, (triton.cdiv(size, TILE),), *operands, TILE=TILE)
    return scaled_NI


def _scale_rows(grad_NO: Tensor, inverse_N1: Tensor) -> Tensor:
    grad_NO = _in_rows(grad_NO)
    rows, columns = grad_NO.shape
    scaled_NO = _empty(grad_NO, rows, columns, dtype=grad_NO.dtype)
    grid, sizes = _cut(rows, columns)
    launch(scale_rows_kernel, grid, grad_NO, inverse_N1, scaled_NO, grad_NO.stride(0), columns, **sizes)
    return scaled_NO


def _gradient_rows(grad_NO: Tensor) -> tuple[Tensor, Tensor]:
    grad_NO = _in_rows(grad_NO)
    rows, columns = grad_NO.shape
    ints_NO, scale_N1 = _empty(grad_NO, rows, columns, dtype=torch.int8), _empty(grad_NO, rows, 1)
    operands = (grad_NO, ints_NO, scale_N1, grad_NO.stride(0), columns)
    launch(gradient_rows_kernel, (rows,), *operands, **_whole(columns))
    return ints_NO, scale_N1


def _gradient_columns(grad_NO: Tensor, inverse_N1: Tensor) -> tuple[Tensor, Tensor]:
    grad_NO, inverse_N1 = _in_rows(grad_NO), inverse_N1.contiguous()
    rows, columns = grad_NO.shape
    grid = triton.cdiv(rows, HEIGHT), triton.cdiv(columns, WIDTH)
    maxima_PO, scale_1O = _empty(grad_NO, grid[0], columns), _empty(grad_NO, 1, columns)
    ints_ON = _empty(grad_NO, columns, rows, dtype=torch.int8)
    sizes = {"HEIGHT": HEIGHT, "WIDTH": WIDTH}
    operands, matrix = (grad_NO, inverse_N1, maxima_PO), (rows, columns, grad_NO.stride(0))
    launch(column_maxima_kernel, grid, *operands, *matrix, **sizes)
    made, parts = (ints_ON, scale_1O), triton.next_power_of_2(grid[0])
    launch(gradient_columns_kernel, grid, *operands, *made, *matrix, grid[0], PARTS=parts, **sizes)
    return ints_ON.t(), scale_1O


def _rescale_gradient(
    sums_NI: Tensor, grad_scale_N1: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    rows, columns = sums_NI.shape
    grad_NI = _empty(sums_NI, rows, columns, dtype=dtype)
    grid, sizes = _cut(rows, columns)
    operands = (sums_NI, grad_scale_N1, weight_scale, grad_NI, sums_NI.stride(0), columns)
    launch(rescale_gradient_kernel, grid, *operands, **sizes)
    return grad_NI


KERNELS = Chains(
    _quantize_rows,
    _quantize_weight,
    _rescale,
    _blend_rows,
    _blend_weight,
    _scale_product,
    _scale_rows,
    _gradient_rows,
    _gradient_columns,
    _rescale_gradient,
)
