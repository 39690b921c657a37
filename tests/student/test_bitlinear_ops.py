"""BitLinear's operations: results of a plain account of them to the bit, one quantisation per input, few
launches, and the kernels of its chains without a GPU.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student import bitnet
from student.bitnet import BitLinear, backward, chains, linear, shared_input
from student.bitnet.backward import Gate, Gates
from student.bitnet.int_mm import aligned, is_integer
from student.bitnet.shared_input import SharedInputs
from tests.pipeline.test_reduce_triton import needs_triton, run
from tests.student.test_ternary_layers import llama, samples


class Launches(TorchDispatchMode):
    """Counts operations that are neither views nor allocations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket is not torch.ops.aten.empty:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        """Of a kernel of Triton's, which is not run."""
        self.counts[kernel.__name__] += 1


class PlainBitLinear(torch.autograd.Function):
    """What BitLinear computes, an operation at a time and without sharing anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ternary, weight_scale = bitnet.quantize_weight(weight)
        rows = x.reshape(-1, x.shape[-1]).float()
        inverse = 127 / rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        ints = (rows * inverse).round().clamp(-128, 127).to(torch.int8)
        if is_integer("cpu", *ints.shape, len(ternary)):
            sums = bitnet.int_mm(ints, ternary.t())
        else:
            sums = torch.mm(ints.to(dtype), ternary.to(dtype).t())
        y = sums / (inverse * (1.0 / weight_scale))
        if bias is not None:
            y = y + bias
        ctx.save_for_backward(ints, ternary, 1.0 / inverse, weight_scale)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y.to(dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ints, ternary, scale, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = (torch.mm(grad, ternary.to(grad.dtype)) * weight_scale).to(x_dtype).reshape(ctx.shape)
        grad_weight = torch.mm((grad * scale).to(grad.dtype).t(), ints.to(grad.dtype)).to(weight_dtype)
        grad_bias = None if bias_dtype is None else grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "autocast"])
@pytest.mark.parametrize("tokens", [1, 45])
def test_the_layer_is_its_plain_account_to_the_bit(kind: str, bias: bool, tokens: int) -> None:
    torch.manual_seed(0)
    layer = BitLinear(97, 33, bias=bias)
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    x = (torch.randn(3, tokens, 97) * 10.0 ** torch.randint(-7, 4, (3, tokens, 1))).to(dtype)
    x[0, 0] = 0
    output = torch.bfloat16 if kind == "autocast" else dtype
    direction = torch.randn(3, tokens, 33).to(output)

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            y = function(leaf)
        y.backward(direction)
        assert leaf.grad is not None
        return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    own = results(layer)
    plain = results(lambda leaf: PlainBitLinear.apply(leaf, layer.weight, layer.bias, output))
    assert len(own) == len(plain) == 3 + bias
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, plain, strict=True))


def test_no_product_gets_beyond_int8() -> None:
    """At maxima of every magnitude, and what is not finite becomes what it was."""
    maxima = torch.cat([torch.logspace(-45, 38, 20_001, dtype=torch.float64), torch.tensor([3.4e38])])
    x = maxima.float().unsqueeze(1) * torch.tensor([1.0, -1.0])
    ints, inverse = bitnet.to_int8(x)
    assert torch.equal(ints.float(), (x * inverse).round().clamp(-128, 127))
    assert ints.abs().amax() == 127
    strange = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [-torch.inf, 3.0]])
    assert torch.equal(bitnet.to_int8(strange)[1].isfinite(), torch.tensor([[True], [False], [True]]))


class Largest(TorchDispatchMode):
    """The most values of a tensor that an operation made, other than views and `empty`."""

    values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        made = isinstance(found, Tensor) and not func.is_view and "out" not in (kwargs or {})
        if made and func.overloadpacket is not torch.ops.aten.empty:
            self.values = max(self.values, found.numel())
        return found


@pytest.mark.parametrize("full_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blending_in_parts_is_blending_at_once_to_the_bit(
    full_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that do not fill the last part; what lies between has the size of a part, not of the weight."""
    monkeypatch.setattr(chains, "PART", 400)
    torch.manual_seed(0)
    full = (torch.randn(41, 97) / 30).to(full_dtype).requires_grad_()
    ternary, scale = bitnet.quantize_weight(full.detach())
    ints, inverse = bitnet.to_int8(full)
    for number, quantised in (("weight", ternary * scale), ("rows", ints * inverse.reciprocal())):
        at_once = (full + (0.3 * (quantised - full.detach())).to(full_dtype)).to(dtype)
        with Largest() as largest:
            if number == "weight":
                in_parts, _ = chains.blend_weight(full, ternary, scale, None, 0.3, dtype)
            else:
                in_parts = chains.blend_rows(full, ints, inverse, 0.3, dtype)
        assert in_parts.dtype == dtype and torch.equal(in_parts, at_once)
        assert largest.values <= 400 * torch.get_num_threads()
        direction = torch.randn(41, 97).to(dtype)
        (grad,) = torch.autograd.grad(in_parts, full, direction)
        assert torch.equal(grad, direction.to(full_dtype))


def trained(model: Any, checkpointing: bool | None) -> tuple[list[Tensor], Counter[str]]:
    """Loss and gradients of one pass, and its operations; checkpointing: reentrant or not."""
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = samples()[1][None]
    with Launches() as launches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())], launches.counts


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("warming", [False, True])
def test_projections_of_one_input_share_its_quantisation(
    checkpointing: bool | None, warming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query, key and value, and gate and up: 4 inputs for the 7 projections of a layer."""
    model = llama().train()
    bitnet.convert_student(model, "none")
    if warming:
        bitnet.set_strengths(model, bitnet.Strengths(0.5, 0.5, 1))
    shared, launches = trained(model, checkpointing)
    passes = 1 if checkpointing is None else 2
    assert launches["amax"] == 2 * 4 * passes
    monkeypatch.setattr(SharedInputs, "quantised", lambda self, x, *_: shared_input._quantise(x, None))
    alone, launches = trained(model, checkpointing)
    assert launches["amax"] == 2 * 7 * passes
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_a_shared_quantisation_is_never_stale() -> None:
    torch.manual_seed(0)
    one, two = BitLinear(33, 9), BitLinear(33, 9)
    x = torch.randn(4, 33)

    def fresh(layer: BitLinear) -> Tensor:
        return layer(x.clone())

    with torch.no_grad():
        one(x)
        x.neg_()
        assert torch.equal(two(x), fresh(two))  # changed between two readers
        one(x)
        x.numpy()[:] *= 3  # behind autograd's back, for the next pass
        assert torch.equal(one(x), fresh(one))
        assert torch.equal(two(x), fresh(two))
    with torch.inference_mode():
        y = torch.randn(4, 33)
        one(y)
        y.neg_()
        assert torch.equal(two(y), two(y.clone()))


def test_what_is_shared_goes_with_its_input() -> None:
    layer, x = BitLinear(33, 9), torch.randn(4, 33)
    layer(x)
    assert linear._inputs._last is not None
    del x
    gc.collect()
    assert linear._inputs._last is None


def int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """As on a GPU, with the copies that cuBLAS wants; some CPUs get its values wrong."""
    return torch._int_mm(*aligned(a_MK, b_KN))


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("strengths", "integers", "int8_backward", "most_backward"),
    [
        (bitnet.FULL, True, False, 7),
        (bitnet.FULL, True, True, 11),
        (bitnet.FULL, False, False, 7),
        (bitnet.Strengths(0.5, 0.5, 1), False, False, 4),
    ],
    ids=["int8 forward", "int8 both", "floating-point", "warm-up"],
)
def test_launches_of_a_layer_on_a_gpu_are_bounded(
    strengths: bitnet.Strengths,
    integers: bool,
    int8_backward: bool,
    most_backward: int,
    dtype: torch.dtype,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 6 of the first projection of an input, whose weight is quantised there, too; 3 of a further one
    with a kept weight. A bias has a gradient of its own: a sum, and a conversion each way.
    """
    from student.bitnet import chains_triton

    torch.manual_seed(0)
    one, two = BitLinear(64, 32, bias=bias), BitLinear(64, 32, bias=bias)
    for layer in (one, two):
        layer.strengths = strengths
        layer.gates = Gates(Gate(False, 1.0), Gate(False, 1.0)) if int8_backward else None
    bitnet.quantize_once(two)
    two.quantized()
    for module in (linear, backward, shared_input):
        monkeypatch.setattr(module, "chains", lambda _: chains_triton.KERNELS)
    monkeypatch.setattr(linear, "is_integer", lambda *_: integers)
    for module in (linear, backward):
        monkeypatch.setattr(module, "int_mm", int_mm)
    x, counts = torch.randn(24, 64, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for layer in (one, two):
            with Launches() as launches:
                monkeypatch.setattr(chains_triton, "launch", launches.launch)
                y = layer(x)
            counts.append(launches.counts.total())
    assert y.dtype == dtype
    direction = torch.ones_like(y)
    with Launches() as launches:
        monkeypatch.setattr(chains_triton, "launch", launches.launch)
        torch.autograd.grad(y, [x, two.weight], direction)
    assert counts[0] <= 6 and counts[1] <= 3
    assert launches.counts.total() <= most_backward + 2 * bias


def test_operands_that_fit_cublas_are_not_copied() -> None:
    a, ternary = torch.ones(18, 16, dtype=torch.int8), torch.ones(24, 16, dtype=torch.int8)
    x, y = aligned(a, ternary.t())
    assert x.data_ptr() == a.data_ptr()
    assert y.data_ptr() == ternary.data_ptr()


@needs_triton
def test_the_kernels_compute_what_the_plain_chains_do() -> None:
    """In a process of its own: the interpreter has to be asked for before Triton is imported."""
    quiet = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    said = run([*quiet, "tests/student/triton_interpreted.py"], TRITON_INTERPRET="1")
    assert " passed" in said and "skipped" not in said


@needs_triton
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """As launches would have them; PTX and machine code come out, and are not run."""
    said = run(["-m", "tests.student.triton_compiled"], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    source = Path(chains.__file__).with_name("chains_triton.py").read_text()
    assert said.split() == sorted(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


@needs_triton
@pytest.mark.parametrize("fault", [None, "off by one", "fails"])
def test_kernels_that_differ_or_fail_are_not_taken(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def quantize_rows(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if fault == "fails":
            raise RuntimeError("Failed to find C compiler")
        ints, inverse, factor = chains.quantize_rows(x, dtype)
        ints[3, 5] += fault == "off by one"
        return ints, inverse, factor

    kernels = chains.PLAIN._replace(quantize_rows=quantize_rows)
    monkeypatch.setattr("student.bitnet.chains_triton.KERNELS", kernels)
    found = chains.compared.__wrapped__(torch.device("cpu"))
    assert found is (kernels if fault is None else chains.PLAIN)
    reasons = {"off by one": "it gives other bits here", "fails": "Failed to find C compiler"}
    assert (reasons[fault] in caplog.text) if fault else not caplog.records
    assert chains.chains(torch.ones(1)) is chains.PLAIN
