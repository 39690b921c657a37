"""Losses between hidden states against sums written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from student.losses import hidden

Loss = Callable[[Tensor, Tensor], Tensor]


def difference(s: list[float], t: list[float]) -> list[float]:
    return [a - b for a, b in zip(s, t, strict=True)]


def normalised(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + 1e-5)
    return [(a - mean) / spread for a in x]


def mse(s: list[float], t: list[float]) -> float:
    return sum(d * d for d in difference(s, t)) / len(s)


def nmse(s: list[float], t: list[float]) -> float:
    return sum(d * d for d in difference(s, t)) / sum(b * b for b in t)


def l1(s: list[float], t: list[float]) -> float:
    return sum(abs(d) for d in difference(s, t)) / len(s)


def smooth_l1(s: list[float], t: list[float]) -> float:
    return sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in difference(s, t)) / len(s)


def cosine(s: list[float], t: list[float]) -> float:
    return 1 - sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))


def logsum(s: list[float], t: list[float]) -> float:
    return math.log(sum(d**4 for d in difference(s, t)) + hidden.FLOOR)


def layer_norm_mse(s: list[float], t: list[float]) -> float:
    return mse(normalised(s), normalised(t))


PLAIN = [mse, nmse, l1, smooth_l1, cosine, logsum, layer_norm_mse]


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("width", [2, 7, 64])
def test_values_and_gradients(plain: Callable[..., float], width: int) -> None:
    loss: Loss = getattr(hidden, plain.__name__)
    torch.manual_seed(width)
    student = (2 * torch.randn(5, width, dtype=torch.float64)).requires_grad_()
    teacher = torch.randn(5, width, dtype=torch.float64)
    wanted = [plain(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    got = loss(student, teacher)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


@pytest.mark.parametrize("plain", PLAIN)
def test_low_precision_inputs_are_compared_in_float32(plain: Callable[..., float]) -> None:
    loss: Loss = getattr(hidden, plain.__name__)
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    got = loss(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", PLAIN)
def test_equal_states_are_the_least_and_have_a_finite_gradient(plain: Callable[..., float]) -> None:
    loss: Loss = getattr(hidden, plain.__name__)
    teacher = torch.randn(3, 8)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-5
    assert (value <= loss(student + 0.1, 2 * teacher)).all()
    least = math.log(hidden.FLOOR) if plain is logsum else 0.0
    torch.testing.assert_close(value, torch.full_like(value, least), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [hidden.cosine, hidden.layer_norm_mse])
def test_scale_does_not_matter_where_it_should_not(loss: Loss) -> None:
    student, teacher = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(loss(student * 100, teacher), loss(student, teacher * 100), rtol=1e-3, atol=0)
