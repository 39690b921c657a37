"""BitLinear: the quantisers, the straight-through gradients, autocast, and agreement with
transformers' own layer.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear

from student import bitnet
from student.bitnet import BitLinear, quantize_activation, quantize_weight


def layer(inputs: int = 96, outputs: int = 40, bias: bool = True, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    return BitLinear(inputs, outputs, bias=bias)


def test_weights_are_ternary_with_the_mean_as_scale() -> None:
    ternary, scale = quantize_weight(torch.tensor([[0.9, -0.2], [-2.0, 0.1]]))
    assert ternary.tolist() == [[1, 0], [-1, 0]]
    assert scale.item() == pytest.approx(0.8)


def test_activations_are_int8_per_token_and_zeros_stay_finite() -> None:
    ints, scale = quantize_activation(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
    assert ints.tolist() == [[64, -127], [0, 0]]
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bias", [True, False])
def test_function_and_gradients_are_those_of_autobitlinear(bias: bool, eager: None) -> None:
    own = layer(bias=bias)
    theirs = AutoBitLinear(96, 40, bias=bias, online_quant=True)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(3, 7, 96)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = [module(one) for module, one in zip((own, theirs), inputs, strict=True)]
    # Ours sums integers exactly and scales once; theirs rounds every product: 96 terms of float32, a few 1e-7
    # each.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(results[0])
    for result in results:
        result.backward(direction)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-4)


def test_autocast_differs_from_float32_by_bfloat16_rounding_only() -> None:
    module = layer(inputs=1536, outputs=64)
    x = torch.randn(5, 1536, requires_grad=True)
    right = module(x)
    right.square().sum().backward()
    gradients = [x.grad.clone(), module.weight.grad.clone()]
    x.grad, module.weight.grad = None, None
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    # The integers are exact; the sum and the scaled result are each rounded to 8 significant bits, 2^-8.
    assert ((low.float() - right).abs() <= (2**-7 + 2**-16) * right.abs()).all()
    low.float().square().sum().backward()
    for own, wanted in zip([x.grad, module.weight.grad], gradients, strict=True):
        assert (own - wanted).norm() <= 2**-6 * wanted.norm()


def test_the_backward_pass_keeps_int8_operands() -> None:
    module, kept = layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(8, 96, requires_grad=True))
    large = [tensor.dtype for tensor in kept if tensor.numel() > 8]
    assert large == [torch.int8, torch.int8]


def test_conversion_shares_the_parameters_and_leaves_everything_else() -> None:
    block = nn.ModuleDict(
        {"proj": nn.Linear(4, 4, bias=False), "norm": nn.LayerNorm(4), "emb": nn.Embedding(5, 4)}
    )
    weight = block["proj"].weight
    assert bitnet.convert(block) == 1
    assert isinstance(block["proj"], BitLinear)
    assert block["proj"].weight is weight
    assert type(block["norm"]) is nn.LayerNorm


def test_the_meter_tells_what_changed_since_the_last_look() -> None:
    block = nn.Sequential(layer(4, 4, bias=False))
    with torch.no_grad():
        block[0].weight.fill_(1.0)
    meter = bitnet.FlipMeter(block)
    with torch.no_grad():
        block[0].weight[0, :3] = -1.0
        block[0].weight[1, 0] = 0.0
        block[0].weight[2] = torch.tensor([2.0, 0.97, 1.03, 0.0])
    assert meter.measure() == pytest.approx(
        {
            "bitnet_flip_rate": 5 / 16,
            "bitnet_zero_share": 2 / 16,
            "bitnet_edge_share": 0.0,
            "bitnet_moved_share": 8 / 16,
            "bitnet_scale_drift": 1 / 16,  # the mean of magnitudes was 1 and is 15 / 16
        }
    )
    with torch.no_grad():
        block[0].weight[3, 3] = 0.48  # still 1, and nearly not: half the scale is 0.45
    again = meter.measure()
    assert (again["bitnet_flip_rate"], again["bitnet_moved_share"]) == (0.0, 1 / 16)
    assert again["bitnet_edge_share"] == 1 / 16


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 97)])
def test_the_meter_counts_flips_in_two_bits_a_weight(shape: tuple[int, int]) -> None:
    """As comparing the ternary weights does, with sizes that do not fill a byte."""
    torch.manual_seed(0)
    block = nn.Sequential(layer(*shape, bias=False), layer(*shape, bias=False, seed=1))
    meter = bitnet.FlipMeter(block)
    before = [one.quantized()[0] for one in block]
    with torch.no_grad():
        for one in block:
            one.weight += 0.3 * torch.randn_like(one.weight)
    flips = sum(int((one.quantized()[0] != was).sum()) for one, was in zip(block, before, strict=True))
    kept = sum(bits.numel() * bits.element_size() for bits in meter._last.values())
    assert kept == 2 * -(-shape[0] * shape[1] // 4)
    assert meter.measure()["bitnet_flip_rate"] == flips / (2 * shape[0] * shape[1])
    assert meter.measure()["bitnet_flip_rate"] == 0


def test_the_meter_counts_edges_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at once, where rows do not fill the last part."""
    monkeypatch.setattr("student.bitnet.chains.PART", 400)
    one = layer(97, 41, bias=False)
    ternary, scale = one.quantized()
    edge = ((one.weight.abs() - scale / 2).abs() < 0.05 * scale).sum()
    measured = bitnet.FlipMeter(nn.Sequential(one)).measure()
    assert edge > 0
    assert measured["bitnet_edge_share"] == edge / one.weight.numel()
    assert measured["bitnet_zero_share"] == (ternary == 0).sum() / one.weight.numel()
