"""Losses on the sparse head: against formulas written out in float64 over the whole vocabulary.

Where the head is the whole vocabulary each is the loss itself; where it is not, those that say so are lower
bounds. Gradients are those of autograd through all logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from student.losses.divergences import coarse
from student.losses.fused import HeadLoss, sparse_head_loss
from student.losses.head import HeadTransform
from student.losses.sparse import SparseTargets, Tempered, token_scale
from student.objective.catalogue import catalogue
from student.objective.terms import Objective, term

N, V, D = 7, 37, 5
GIVEN = {"cakld": {"confidence": 0.3}}
HEAD = [name for name, loss in catalogue().items() if loss.kind == "head"]
SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p: Tensor, q: Tensor, mu: float) -> Tensor:
    out = []
    for p_V, q_V in zip(p, q, strict=True):
        order = p_V.argsort(descending=True)
        mass, best = 0.0, []
        for token in order.tolist():
            if mass < mu:
                best.append(token)
            mass += float(p_V[token])
        gap = (p_V - q_V).abs()
        w = gap[best].sum() / gap.sum()
        out.append(w * kl(p_V, q_V) + (1 - w) * kl(q_V, p_V))
    return torch.stack(out)


def transport(p: Tensor, q: Tensor) -> Tensor:
    """Of the 32 best tokens, as Sinkhorn's scaling gives it."""
    best = p.topk(32, -1).indices
    a, b = p.gather(-1, best), q.gather(-1, best)
    cost = (a[:, :, None] - b[:, None, :]).abs()
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return (plan * cost).sum((1, 2))


def ranked(p: Tensor, z: Tensor, price: Callable[[Tensor], Tensor]) -> Tensor:
    best = p.topk(32, -1).indices
    out = []
    for order, z_V in zip(best, z, strict=True):
        pairs = [(i, j) for i in range(32) for j in range(i + 1, 32)]
        out.append(torch.stack([price(z_V[order[i]] - z_V[order[j]]) for i, j in pairs]).mean())
    return torch.stack(out)


def centred(z: Tensor) -> Tensor:
    return z - z.mean(-1, keepdim=True)


def raised(p: Tensor, q: Tensor, label: Tensor) -> Tensor:
    p_y, q_y = (x.gather(-1, label[:, None])[:, 0] for x in (p, q))
    return -(1 + p_y) * q_y.log() - ((p * q.log()).sum(-1) - p_y * q_y.log())


def scale_of(p: Tensor, label: Tensor) -> Tensor:
    score = -p.gather(-1, label[:, None])[:, 0].log() / 10
    shares = [torch.softmax(score[s == SEQUENCE], 0) * (s == SEQUENCE).sum() for s in (0, 1)]
    return torch.cat(shares)


# name -> formula of (z student logits, t teacher logits, label), all over the whole vocabulary.
EXACT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": lambda z, t, y: kl(t.softmax(-1), z.softmax(-1)),
    "ce": lambda z, t, y: -z.log_softmax(-1).gather(-1, y[:, None])[:, 0],
    "reverse_kl": lambda z, t, y: kl(z.softmax(-1), t.softmax(-1)),
    "jsd": lambda z, t, y: jsd(t.softmax(-1), z.softmax(-1), 0.5),
    "skew_kl": lambda z, t, y: kl(t.softmax(-1), 0.1 * t.softmax(-1) + 0.9 * z.softmax(-1)),
    "skew_reverse_kl": lambda z, t, y: kl(z.softmax(-1), 0.9 * t.softmax(-1) + 0.1 * z.softmax(-1)),
    "adaptive_kl": lambda z, t, y: adaptive(t.softmax(-1), z.softmax(-1), 0.5),
    "cakld": lambda z, t, y: 0.3 * kl(z.softmax(-1), t.softmax(-1)) + 0.7 * kl(t.softmax(-1), z.softmax(-1)),
    "tvd": lambda z, t, y: (t.softmax(-1) - z.softmax(-1)).abs().sum(-1) / 2,
    "tsld": lambda z, t, y: scale_of(t.softmax(-1), y) * kl(t.softmax(-1), z.softmax(-1)),
    "soft_mse": lambda z, t, y: (t.softmax(-1) - z.softmax(-1)).square().sum(-1),
    "logit_mse": lambda z, t, y: (centred(z) - centred(t)).square().mean(-1),
    "top1": lambda z, t, y: -z.log_softmax(-1).gather(-1, t.argmax(-1)[:, None])[:, 0],
    "hinge_ranking": lambda z, t, y: ranked(t, z, lambda gap: (1 - gap).clamp_min(0)),
    "logistic_ranking": lambda z, t, y: ranked(t, z, lambda gap: torch.log1p(torch.exp(-gap))),
    "sinkhorn": lambda z, t, y: transport(t.softmax(-1), z.softmax(-1)),
    "uld": lambda z, t, y: (t.softmax(-1).sort(-1).values - z.softmax(-1).sort(-1).values).abs().sum(-1),
    "one_for_all": lambda z, t, y: raised(t.softmax(-1), z.softmax(-1), y),
}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, teacher logits and labels, all float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return hidden, weight, teacher, torch.randint(V, (N,), generator=generator)


def head_of(teacher: Tensor, label: Tensor, k: int, temperature: float = 1.0) -> SparseTargets:
    logprob, ids = teacher.log_softmax(-1).topk(k, -1)
    rest = teacher.log_softmax(-1).scatter(-1, ids, -math.inf).logsumexp(-1)
    known = teacher.log_softmax(-1).gather(-1, label[:, None])[:, 0]
    tempered = (teacher / temperature).log_softmax(-1)
    there = Tempered(tempered.gather(-1, ids), tempered.scatter(-1, ids, -math.inf).logsumexp(-1))
    return SparseTargets(
        ids,
        logprob,
        rest,
        label,
        label_logprob_N=known,
        token_scale_N=token_scale(known, SEQUENCE),
        tempered={} if temperature == 1.0 else {temperature: there},
    )


def fused(hidden: Tensor, weight: Tensor, targets: SparseTargets, name: str, **options: float) -> HeadLoss:
    objective = Objective.of([term(name, **{**GIVEN.get(name, {}), **options})])
    terms = [(objective.terms[0].function, 1.0)]
    plain = HeadTransform()
    return sparse_head_loss(
        hidden, weight, None, targets, terms, plain, chunk=3, reduction=objective.reduction
    )


def test_every_loss_has_its_formula_here() -> None:
    assert set(EXACT) == set(HEAD)


@pytest.mark.parametrize("name", HEAD)
def test_with_the_whole_vocabulary_as_head_it_is_the_loss_itself(name: str) -> None:
    hidden, weight, teacher, label = drawn(1)
    got = fused(hidden, weight, head_of(teacher, label, V), name)
    want = EXACT[name](hidden @ weight.T, teacher, label)
    torch.testing.assert_close(got.terms_SN[0], want.detach(), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(got.total, (hidden, weight))
    wanted = torch.autograd.grad(want.sum(), (hidden, weight))
    if name == "adaptive_kl":  # its weight lets no gradient through, the formula above does
        return
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("name", [n for n in HEAD if catalogue()[n].exactness == "bound"])
def test_a_bound_is_one(name: str, k: int) -> None:
    for seed in range(5):
        hidden, weight, teacher, label = drawn(seed)
        got = fused(hidden, weight, head_of(teacher, label, k), name).terms_SN[0]
        want = EXACT[name](hidden @ weight.T, teacher, label)
        if name == "logit_mse":  # a mean over the head; sums are what is compared
            got, want = got * k, want * V
        assert (got <= want + 1e-9).all()


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("name", [name for name in HEAD if name != "adaptive_kl"])
def test_gradients_are_those_of_the_loss_through_all_logits(name: str, k: int) -> None:
    """Against finite differences of the value, which goes through the same pass without any gradient.

    Not adaptive_kl: its weight is a constant to the gradient, and none to a difference.
    """
    hidden, weight, teacher, label = drawn(3)
    targets = head_of(teacher, label, k)
    total = fused(hidden, weight, targets, name).total
    gradients = torch.autograd.grad(total, (hidden, weight))
    generator = torch.Generator().manual_seed(0)
    for place, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = [hidden.detach(), weight.detach()]
            moved[place] = moved[place] + sign * 1e-6 * step
            values.append(fused(moved[0], moved[1], targets, name).total)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_another_temperature_is_that_of_both_sides(name: str) -> None:
    hidden, weight, teacher, label = drawn(2)
    got = fused(hidden, weight, head_of(teacher, label, V, 2.0), name, temperature=2.0)
    want = 4 * EXACT[name](hidden @ weight.T / 2, teacher / 2, label)
    torch.testing.assert_close(got.terms_SN[0], want.detach(), rtol=1e-9, atol=1e-9)
    bound = fused(hidden, weight, head_of(teacher, label, 5, 2.0), name, temperature=2.0)
    assert (bound.terms_SN[0] <= want + 1e-9).all()


def test_merged_distributions_sum_to_one() -> None:
    hidden, weight, teacher, label = drawn(4)
    seen = []

    def keep(student: object, targets: SparseTargets) -> Tensor:
        seen.append(coarse(student, targets))  # type: ignore[arg-type]
        return targets.tail_N * 0

    sparse_head_loss(hidden, weight, None, head_of(teacher, label, 6), [(keep, 1.0)], HeadTransform())
    for log_p, log_q in seen:
        ones = torch.ones(N, dtype=torch.float64)
        torch.testing.assert_close(log_p.exp().sum(-1), ones)
        torch.testing.assert_close(log_q.exp().sum(-1), ones)
