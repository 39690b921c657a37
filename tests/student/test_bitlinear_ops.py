"""BitLinear's operations: results of a plain account of them to the bit, one quantisation per input, few
launches, and the compiled chains.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from student import bitnet
from student.bitnet import BitLinear, chains, linear, shared_input
from student.bitnet.int_mm import aligned, is_integer
from student.bitnet.shared_input import SharedInputs
from tests.student.test_ternary_layers import llama, samples


class Launches(TorchDispatchMode):
    """Counts operations that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


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
    monkeypatch.setattr(SharedInputs, "quantised", lambda self, x, reader: shared_input._quantise(x))
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


def test_launches_of_a_layer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With integer products, whose values some CPUs get wrong; the weight was quantised before."""
    monkeypatch.setattr(linear, "is_integer", lambda *_: True)
    monkeypatch.setattr(linear, "int_mm", torch._int_mm)
    torch.manual_seed(0)
    one, two = BitLinear(64, 32, bias=False), BitLinear(64, 32, bias=False)
    bitnet.quantize_once(nn.ModuleList([one, two]))
    one(torch.randn(20, 64)), two(torch.randn(20, 64))
    x = torch.randn(20, 64, requires_grad=True)
    with Launches() as first:
        one(x)
    with Launches() as second:
        y = two(x)
    direction = torch.ones_like(y)
    with Launches() as backward:
        y.backward(direction)
    assert first.counts.total() == 12
    assert second.counts.total() == 4
    assert backward.counts.total() <= 8  # one is the copy into .grad


def test_operands_that_fit_cublas_are_not_copied() -> None:
    a, ternary = torch.ones(18, 16, dtype=torch.int8), torch.ones(24, 16, dtype=torch.int8)
    x, y = aligned(a, ternary.t())
    assert x.data_ptr() == a.data_ptr()
    assert y.data_ptr() == ternary.data_ptr()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_chains_agree_to_the_bit() -> None:
    assert chains.agree(chains.compile_chains(), "cpu")


def test_chains_that_differ_or_do_not_compile_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(x: Tensor) -> tuple[Tensor, Tensor]:
        ints, inverse = chains.PLAIN.to_int8(x)
        ints[3, 5] += 1
        return ints, inverse

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("Failed to find C compiler")

    for to_int8, taken in ((chains.PLAIN.to_int8, True), (off_by_one, False), (broken, False)):
        made = chains.Chains(to_int8, chains.rescale)
        monkeypatch.setattr(chains, "compile_chains", lambda made=made: made)
        chains._compared.cache_clear()
        assert chains._compared("cpu") == (made if taken else chains.PLAIN)
    chains._compared.cache_clear()
    assert chains.chains("cpu") is chains.PLAIN
