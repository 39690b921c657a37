"""BitLinear in training: norms, strengths, and weights that are quantised once per step but never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from student import bitnet
from student.bitnet import BitLinear, RMSNorm, Strengths, Warmup

ALMOST = Strengths(1.0, 1 - 1e-12, 1.0)  # 1 in float32, yet on the path that multiplies floating-point values


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=60,
        intermediate_size=84,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator) for length in (7, 31)]


def integer_reference(layer: BitLinear, x_NI: Tensor) -> Tensor:
    """What BitLinear means: norm and quantisers in float32, one product of integers, float64 after it."""
    if layer.rms_norm is not None:
        x_NI = layer.rms_norm(x_NI)
    inverse = 1.0 / layer.weight.abs().mean().clamp(min=1e-5)
    ternary_OI = (layer.weight * inverse).round().clamp(-1, 1).long()
    inverse_N1 = 127 / x_NI.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    ints_NI = (x_NI * inverse_N1).round().clamp(-128, 127).long()
    return (ints_NI @ ternary_OI.T).double() / inverse_N1.double() / inverse.double()


@pytest.mark.parametrize("strengths", [bitnet.FULL, ALMOST], ids=["integers", "fake-quantised"])
@pytest.mark.parametrize("conversion", bitnet.CONVERSIONS)
@torch.no_grad()
def test_training_computes_the_integer_reference(conversion: str, strengths: Strengths) -> None:
    """Sums of up to 84 products in float32: their rounding is a few times 2^-24 of the result's size."""
    model = llama().train()
    bitnet.convert_calibrated(model, conversion, samples())
    bitnet.set_strengths(model, strengths)
    errors = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            right = integer_reference(layer, args[0])
            errors[name] = float((output - right).norm() / right.norm())

        return hook

    for name, layer in bitnet.bit_linears(model):
        layer.register_forward_hook(compare(name))
    model(samples()[1][None])
    assert len(errors) == 14
    assert max(errors.values()) <= 1e-5


def test_the_norm_is_the_usual_one_in_float32() -> None:
    norm = RMSNorm(33, 1e-6)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(5, 33).bfloat16()
    wide = x.double()
    right = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x).double(), right, rtol=1e-6, atol=1e-7)


def blended_layer() -> tuple[BitLinear, Tensor]:
    torch.manual_seed(3)
    layer = BitLinear(33, 9).train()
    layer.rms_norm = RMSNorm(33, 1e-6)
    return layer, 3 * torch.randn(5, 33)


def test_strength_zero_is_the_plain_layer_and_eval_mode_the_full_one() -> None:
    layer, x = blended_layer()
    full = layer(x)
    layer.strengths = Strengths(0, 0, 0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), full)


@pytest.mark.parametrize("strengths", [(0.3, 1, 1), (1, 0.3, 1), (0.5, 0, 0), (0.25, 0.75, 0.5)])
def test_strengths_blend_each_part_and_pass_gradients_straight_through(
    strengths: tuple[float, float, float],
) -> None:
    layer, x = blended_layer()
    layer.strengths = Strengths(*strengths)
    weights, activations, norms = strengths
    assert layer.rms_norm is not None
    normed = x + norms * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() - x)
    ternary, scale = bitnet.quantize_weight(layer.weight.detach())
    ints, scales = bitnet.quantize_activation(normed)
    w = (layer.weight.detach() + weights * (ternary * scale - layer.weight.detach())).double()
    a = (normed + activations * (ints * scales - normed)).double()
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y.double(), a @ w.T + layer.bias, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(y)
    y.backward(direction)
    torch.testing.assert_close(layer.weight.grad.double(), direction.double().T @ a, rtol=1e-5, atol=1e-5)
    assert x.grad is not None and bool(x.grad.any())
    assert bool(layer.rms_norm.weight.grad.any()) == (norms > 0)


def test_strengths_rise_with_the_share_of_the_steps() -> None:
    warmup = Warmup(weights=0.5, activations=0.1)
    assert warmup.at(0, 20) == (0, 0, 1)
    assert warmup.at(1, 20) == (pytest.approx(0.1), pytest.approx(0.5), 1)
    assert warmup.at(10, 20) == warmup.at(20, 20) == bitnet.FULL


def change_data(layer: BitLinear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def change_in_place(layer: BitLinear) -> None:
    with torch.no_grad():
        layer.weight.neg_()


def load(layer: BitLinear) -> None:
    layer.load_state_dict({"weight": torch.randn_like(layer.weight), "bias": layer.bias.detach()})


def change_twice(layer: BitLinear) -> None:
    """So that the second weight may lie where the first one was."""
    for _ in range(2):
        change_data(layer)


def fused_step(layer: BitLinear) -> None:
    """Changes the weight without autograd's counting it, as bitsandbytes does."""
    layer.weight.grad = torch.randn_like(layer.weight)
    version = layer.weight._version
    torch.optim.AdamW([layer.weight], lr=1.0, fused=True).step()
    assert layer.weight._version == version
    bitnet.quantize_once(layer)


def write_through_data(layer: BitLinear) -> None:
    layer.weight.data.neg_()
    bitnet.quantize_once(layer)


@pytest.mark.parametrize(
    "change", [change_data, change_in_place, load, change_twice, fused_step, write_through_data]
)
def test_kept_weights_are_never_stale(change: Callable[[BitLinear], None]) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(33, 9), torch.randn(4, 33)
    bitnet.quantize_once(layer)
    before = layer(x)
    assert layer.quantized()[0] is layer.quantized()[0]
    change(layer)
    fresh = BitLinear(33, 9)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_without_a_promise_nothing_is_kept() -> None:
    layer, x = BitLinear(33, 9), torch.randn(4, 33)
    before = layer(x)
    layer.weight.data.neg_()
    assert not torch.equal(layer(x), before)
    bitnet.quantize_once(layer)
    layer(x)
    bitnet.quantize_always(layer)
    assert layer.quantized()[0] is not layer.quantized()[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_quantise_for_themselves(copied: Callable[[BitLinear], BitLinear]) -> None:
    layer, x = BitLinear(33, 9), torch.randn(4, 33)
    bitnet.quantize_once(layer)
    layer(x)
    assert set(layer.state_dict()) == {"weight", "bias"}
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.neg_()
    torch.testing.assert_close(other(x) - other.bias, layer.bias - layer(x))
