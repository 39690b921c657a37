"""The worked example of docs/concepts.md, computed by the losses that train."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from student.losses.sparse import ReducedLogits, SparseTargets, forward_kl

PAGE = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
P = torch.tensor([0.50, 0.20, 0.10, 0.08, 0.05, 0.04, 0.02, 0.01], dtype=torch.float64)
Q = torch.tensor([0.40, 0.20, 0.10, 0.10, 0.08, 0.06, 0.04, 0.02], dtype=torch.float64)
HEAD, DRAWS = 2, 3
TAIL = range(HEAD, 8)


def targets(draws: tuple[int, ...]) -> SparseTargets:
    """The head A, B and these draws; without any, one bucket for the rest."""
    ids = [*range(HEAD), *dict.fromkeys(draws)]
    share = [draws.count(token) * 0.3 / DRAWS for token in dict.fromkeys(draws)]
    p = torch.tensor([[*P[:HEAD], *share]], dtype=torch.float64)
    entropy = -(P * P.log()).sum()[None] if draws else None
    tail = torch.tensor([-math.inf if draws else math.log(0.3)], dtype=torch.float64)
    return SparseTargets(
        ids_NK=torch.tensor([ids]),
        logprob_NK=p.log(),
        tail_N=tail,
        label_N=torch.zeros(1).long(),
        entropy_N=entropy,
        draws=len(share),
    )


def kl(draws: tuple[int, ...], q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient with respect to all eight logits."""
    logits = q.log().requires_grad_()
    known = targets(draws)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[known.ids_NK[0]] = True
    rest = logits.masked_fill(inside, -math.inf).logsumexp(0)[None]
    value = forward_kl(ReducedLogits(head_NK=logits[known.ids_NK], tail_N=rest, label_N=logits[:1]), known)[0]
    value.backward()
    assert logits.grad is not None
    return float(value.detach()), logits.grad


def on_average(q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Over all draws, each as probable as it is."""
    total, gradient = 0.0, torch.zeros(8, dtype=torch.float64)
    for draws in itertools.product(TAIL, repeat=DRAWS):
        chance = float(torch.stack([P[token] / 0.3 for token in draws]).prod())
        value, slope = kl(draws, q)
        total, gradient = total + chance * value, gradient + chance * slope
    return total, gradient


def test_the_values() -> None:
    full = float((P * (P / Q).log()).sum())
    for name, value in (
        ("over the whole vocabulary", full),
        ("× 0.3", kl((), Q)[0]),
        ("head and these three draws", kl((2, 2, 4), Q)[0]),
        ("over all possible draws", on_average(Q)[0]),
    ):
        assert f"{name} | {value:.4f} |".replace("-", "−") in PAGE
    assert on_average(Q)[0] == pytest.approx(full, abs=1e-12)


def test_the_gradients() -> None:
    top = 0.7 * P - torch.cat([P[:HEAD], torch.zeros(6, dtype=torch.float64)])
    for name, gradient in (
        ("(0.7·q − p)", top),
        ("one bucket", kl((), P)[1]),
        ("the three draws", kl((2, 2, 4), P)[1]),
        ("draws, on average", on_average(P)[1]),
    ):
        cells = [f"{x:.3f}".replace("-", "−") if abs(x) > 1e-12 else "0" for x in gradient.tolist()]
        assert f"{name} | {' | '.join(cells)} |" in PAGE
