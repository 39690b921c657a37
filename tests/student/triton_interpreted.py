"""BitLinear's Triton kernels in Triton's interpreter on a CPU, against the plain functions.

test_bitlinear_ops.py runs this file in a process of its own, because TRITON_INTERPRET has to be set before
Triton is imported.

Shapes: N tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from student import bitnet
from student.bitnet import BitLinear, backward, chains, chains_triton, linear, shared_input
from student.bitnet.backward import Gate, Gates
from student.bitnet.chains import PLAIN
from student.bitnet.chains_triton import KERNELS, PARTS, TILE

ROUNDING = 2.0**-24  # of float32, relative
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounded_to_bfloat16(input: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
    """Triton's interpreter cuts off what a GPU rounds to the nearest bfloat16."""
    if (str(source), str(target)) != ("fp32", "bf16"):
        return converted(input, source, target, mode)
    found = torch.from_numpy(np.ascontiguousarray(input)).bfloat16().view(torch.uint16).numpy()
    return found.reshape(input.shape)


converted = interpreter._convert_float


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with patch.object(interpreter, "_convert_float", rounded_to_bfloat16):
        yield


def values(*shape: int, seed: int = 0) -> Tensor:
    """Of many magnitudes, row by row, and a row of nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= 10.0 ** torch.randint(-7, 4, (shape[0], 1), generator=generator)
    x[shape[0] // 2] = 0
    return x


def same(found: object, right: object) -> None:
    """In type, shape and every bit."""
    for a, b in zip(found, right, strict=True):  # type: ignore[call-overload]
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)


def exact_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Absolute values whose sum has no rounding in any order, halves of the scale among them."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-64, 65, (outputs, inputs), generator=generator) / 64).to(dtype)


def test_this_is_the_interpreter() -> None:
    assert isinstance(chains_triton.rescale_kernel, interpreter.InterpretedFunction)


def test_the_sample_agrees() -> None:
    assert chains.agree(KERNELS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, dtype) for shape in ((1, 1), (5, 97)) for dtype in DTYPES),
        ((7, 1), torch.float32),
        ((2, 4097), torch.bfloat16),
    ],
)
def test_every_chain_of_tokens_gives_the_bits_of_the_plain_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x_NI = values(*shape).to(dtype)
    if dtype == torch.float16:
        x_NI = x_NI.clamp(-6e4, 6e4)
    for factor in (None, torch.float32, torch.bfloat16):
        same(KERNELS.quantize_rows(x_NI, factor), PLAIN.quantize_rows(x_NI, factor))
    ints_NI, inverse_N1, _ = PLAIN.quantize_rows(x_NI, None)
    scale, bias_O = torch.tensor(0.0371), x_NI[0]
    generator = torch.Generator().manual_seed(2)
    sums_NO = torch.randint(-(2**30), 2**30, shape, generator=generator, dtype=torch.int32)
    for sums in (sums_NO, x_NI * 1000):
        for bias in (None, bias_O):
            own = KERNELS.rescale(sums.clone(), inverse_N1, scale, bias, dtype)
            same([own], [PLAIN.rescale(sums.clone(), inverse_N1, scale, bias, dtype)])
    for output in (torch.float32, torch.bfloat16):
        arguments = (x_NI, ints_NI, inverse_N1, 0.37, output)
        same([KERNELS.blend_rows(*arguments)], [PLAIN.blend_rows(*arguments)])
        own = KERNELS.scale_product(x_NI.clone(), scale, output)
        same([own], [PLAIN.scale_product(x_NI.clone(), scale, output)])
    same([KERNELS.scale_rows(x_NI, inverse_N1)], [PLAIN.scale_rows(x_NI, inverse_N1)])
    same(KERNELS.gradient_rows(x_NI), PLAIN.gradient_rows(x_NI))
    same(KERNELS.gradient_columns(x_NI, inverse_N1), PLAIN.gradient_columns(x_NI, inverse_N1))
    arguments = (sums_NO, inverse_N1, scale, dtype)
    same([KERNELS.rescale_gradient(*arguments)], [PLAIN.rescale_gradient(*arguments)])


def test_gradients_of_several_tiles() -> None:
    """One more than a tile has, in both directions."""
    grad_NO, inverse_N1 = values(65, 129), torch.rand(65, 1) + 0.5
    own, plain = KERNELS.gradient_columns(grad_NO, inverse_N1), PLAIN.gradient_columns(grad_NO, inverse_N1)
    same(own, plain)
    assert own[0].t().is_contiguous()


def test_rows_that_do_not_lie_together() -> None:
    x_NI = values(9, 40)
    sliced, transposed, expanded = x_NI[::2, 3:36], x_NI.t(), x_NI[:1].expand(5, 40)
    for x in (sliced, transposed, expanded, x_NI[:0]):
        same(KERNELS.quantize_rows(x, None)[:2], PLAIN.quantize_rows(x, None)[:2])
        inverse_N1 = torch.rand(len(x), 1) + 0.5
        same([KERNELS.scale_rows(x, inverse_N1)], [PLAIN.scale_rows(x, inverse_N1)])
    sums = torch.randint(-99, 99, (9, 40), dtype=torch.int32)[:, :33]  # of a padded product
    arguments = (sums, torch.rand(9, 1) + 0.5, torch.tensor(0.3), None, torch.float32)
    same([KERNELS.rescale(*arguments)], [PLAIN.rescale(*arguments)])


def test_what_is_not_finite_has_the_scale_of_the_plain_one() -> None:
    x_NI = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [-torch.inf, 3.0], [torch.nan, torch.inf]])
    same([KERNELS.quantize_rows(x_NI, None)[1].isnan()], [PLAIN.quantize_rows(x_NI, None)[1].isnan()])
    for own, plain in (
        (KERNELS.gradient_rows(x_NI)[1], PLAIN.gradient_rows(x_NI)[1]),
        (
            KERNELS.gradient_columns(x_NI, torch.ones(4, 1))[1],
            PLAIN.gradient_columns(x_NI, torch.ones(4, 1))[1],
        ),
    ):
        same([own.isfinite()], [plain.isfinite()])
        assert not own.isfinite().any()
    weight_OI = torch.ones(3, 5)
    weight_OI[1, 2] = torch.nan
    assert KERNELS.quantize_weight(weight_OI)[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 97), (65, 130)])
def test_weights_whose_sum_is_exact_get_the_bits_of_the_plain_ones(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight_OI = exact_weight(*shape, dtype)
    ternary_OI, scale = PLAIN.quantize_weight(weight_OI)
    same(KERNELS.quantize_weight(weight_OI), (ternary_OI, scale))
    same(KERNELS.quantize_weight(weight_OI.t()), PLAIN.quantize_weight(weight_OI.t()))
    for output in (torch.float32, torch.bfloat16):
        arguments = (weight_OI, ternary_OI, scale, values(3, shape[0])[0].to(dtype), 0.37, output)
        same(KERNELS.blend_weight(*arguments), PLAIN.blend_weight(*arguments))


def test_half_a_scale_rounds_to_the_even_zero() -> None:
    """The mean is 1 exactly."""
    weight_OI = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.75, -0.25, 2.5, -0.5]])
    ternary_OI, scale = KERNELS.quantize_weight(weight_OI)
    assert float(scale) == 1.0
    assert ternary_OI.tolist() == [[0, 0, 1, -1], [1, 0, 1, 0]]


def test_a_weight_of_a_real_size() -> None:
    """1536 x 576 of any values: a sum of TILE lanes, then of each part, then of PARTS, in trees or one after
    the other, makes at most as many roundings as it has terms in a row; the division, the reciprocal and its
    reciprocal make three. Weights whose distance to half the scale is above that error are rounded right.
    """
    weight_OI = torch.randn(1536, 576, generator=torch.Generator().manual_seed(3)) * 0.02
    ternary_OI, scale = KERNELS.quantize_weight(weight_OI)
    mean = weight_OI.double().abs().mean()
    tiles = -(-weight_OI.numel() // (TILE * PARTS))
    within = (tiles + (TILE - 1) + (PARTS - 1) + 3) * ROUNDING
    assert abs(float(scale) / float(mean) - 1) <= within
    ratio_OI = weight_OI.double() / mean
    sure_OI = (ratio_OI.abs() - 0.5).abs() > (within + 2 * ROUNDING) * 0.5
    assert sure_OI.double().mean() > 0.999
    right_OI = ratio_OI.round().clamp(-1, 1).to(torch.int8)
    assert torch.equal(ternary_OI[sure_OI], right_OI[sure_OI])


def results(layer: BitLinear, x: Tensor, dtype: torch.dtype, direction: Tensor) -> list[Tensor]:
    """Output and gradients."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != x.dtype):
        y = layer(leaf)
    y.backward(direction)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("strengths", "integers", "int8_backward"),
    [
        (bitnet.FULL, False, False),
        (bitnet.FULL, True, True),
        (bitnet.Strengths(0.4, 0.7, 1), False, False),
        (bitnet.Strengths(1, 0.7, 1), False, False),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_a_layer_of_kernels_is_the_plain_one_to_the_bit(
    kind: str,
    strengths: bitnet.Strengths,
    integers: bool,
    int8_backward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, with a bias; with integer products and without."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    layer = BitLinear(97, 33).to(dtype)
    layer.weight.data = exact_weight(33, 97, dtype)
    layer.strengths = strengths
    x = values(9, 97).to(dtype)
    output = torch.float32 if kind == "float32" else torch.bfloat16
    direction = torch.randn(9, 33).to(output)
    if int8_backward:
        layer.gates = Gates(Gate(False, 1.0), Gate(False, 1.0))
    if integers:
        monkeypatch.setattr(linear, "is_integer", lambda *_: True)
        for module in (linear, backward):
            product: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a.long() @ b.long()).int()  # noqa: E731
            monkeypatch.setattr(module, "int_mm", product)
    plain = results(layer, x, output, direction)
    for module in (linear, backward, shared_input):
        monkeypatch.setattr(module, "chains", lambda _: KERNELS)
    same(results(layer, x, output, direction), plain)
