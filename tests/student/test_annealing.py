"""Softened ternary weights: their values and gradients, how they harden, and a training that is resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student import bitnet
from student.bitnet import Annealing, BitLinear, Strengths, annealing
from tests.student.test_ternary_layers import llama, samples
from tests.student.test_ternary_training import SUBLN, Run, Train
from tests.student.test_training import logs, weights


def plain(weight: Tensor, scale: Tensor, temperature: float, strength: float) -> Tensor:
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=weight.dtype)
    p = torch.softmax(-((weight / scale).unsqueeze(-1) - levels).square() / temperature, -1)
    return weight + strength * (scale * (p @ levels) - weight)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.4, 0.05, annealing.LOWEST])
def test_values_and_gradients_are_those_of_the_softmax(temperature: float, strength: float) -> None:
    """Up to weights of 40 scales, beyond what exp holds; exponents of float32 are off by 2^-24 of themselves,
    so softmax by that times the largest one, 0.5 / temperature at the threshold, and its slope, of up to
    0.5 / temperature, by as much again.
    """
    torch.manual_seed(0)
    weight = torch.randn(13, 7)
    weight[0] = torch.tensor([0.0, 0.5, -0.5, 1.0, 40.0, -40.0, 1e-7])
    scale, direction = torch.tensor(0.7), torch.randn(13, 7)
    own, right = weight.clone().requires_grad_(), weight.double().requires_grad_()
    value = bitnet.soften_weight(own, scale, temperature, strength)
    value.backward(direction)
    expected = plain(right, scale.double(), temperature, strength)
    expected.backward(direction.double())
    assert own.grad is not None and right.grad is not None
    off = 2.0**-21 / temperature
    torch.testing.assert_close(value.double(), expected, rtol=2.0**-22, atol=off)
    torch.testing.assert_close(own.grad.double(), right.grad, rtol=2.0**-20, atol=off / temperature)


def test_a_soft_layer_multiplies_softened_weights_and_eval_mode_rounds() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(33, 9).train(), torch.randn(5, 33)
    full = layer(x)
    layer.strengths, layer.temperature = Strengths(0.6, 1.0, 1.0), 0.2
    scale = bitnet.quantize_weight(layer.weight.detach())[1]
    ints, scales = bitnet.quantize_activation(x)
    w = plain(layer.weight, scale, 0.2, 0.6)
    torch.testing.assert_close(layer(x), (ints * scales) @ w.T + layer.bias)
    assert torch.equal(layer.eval()(x), full)


def test_temperatures_fall_behind_the_warm_up() -> None:
    schedule = Annealing(start=0.25, end=0.75)
    found = [schedule.at(step, 8) for step in range(9)]
    half = annealing.FIRST / 2
    assert found == pytest.approx(
        [2 * half] * 3 + [half * (1 + math.cos(math.pi / 4 * n)) for n in (1, 2, 3)] + [0.0] * 3
    )
    assert Annealing().at(0, 8) == 0
    layer = torch.nn.Sequential(BitLinear(4, 4))
    bitnet.set_temperature(layer, annealing.LOWEST * 0.99)
    assert layer[0].temperature == 0


def test_matrices_in_which_the_loss_bends_more_are_colder() -> None:
    model = llama()
    bitnet.convert_student(model, "subln")
    curvature = bitnet.curvatures(model, samples())
    factors = bitnet.relative_temperatures(curvature)
    ordered = [factors[name] for name in sorted(curvature, key=lambda name: curvature[name])]
    assert ordered == sorted(ordered, reverse=True)
    assert math.exp(-0.4) < ordered[-1] < math.exp(-0.2) < ordered[0] < 1
    # A sum of squares of the gradients that any backward pass gives.
    model.train()
    bitnet.set_strengths(model, Strengths(0, 0, 1))
    total = 0.0
    for tokens in samples():
        model.zero_grad()
        model(input_ids=tokens[None], labels=tokens[None]).loss.backward()
        total += float(model.model.layers[0].mlp.up_proj.weight.grad.square().sum())
    assert curvature["model.layers.0.mlp.up_proj"] == pytest.approx(total, rel=1e-4)


def test_a_resumed_run_has_the_same_temperatures(train: Train, tmp_path: Path) -> None:
    """The checkpoint is from amid the annealing, behind which weights are ternary."""
    flags = (*SUBLN, "--bitnet-warmup-weights", 0.3, "--bitnet-anneal", 0.8, "--max_steps", 6)
    flags += ("--save_steps", 3, "--logging_steps", 1, "--learning-rate", 0.01)
    train(tmp_path / "straight", *flags)
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", tmp_path / "straight" / "checkpoint-3")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    train(tmp_path / "hard", *flags, "--bitnet-anneal", 0)
    found = [[log["loss"] for log in logs(tmp_path / kind) if "loss" in log] for kind in ("straight", "hard")]
    assert found[0][0] == found[1][0] != found[0][1] != found[1][1]


def test_annealing_ends_behind_the_warm_up(distily_train: Run, cache: Path, tmp_path: Path) -> None:
    words = ("--output-dir", tmp_path, *SUBLN, "--bitnet-warmup-weights", 0.5, "--bitnet-anneal", 0.5)
    code, _, err = distily_train(cache, *words)
    assert code == 2
    assert "--bitnet-anneal 0.5: give a share of the steps above that of --bitnet-warmup-weights" in err
