"""Every loss on the sparse distribution, through the fused head, against its definition in float64.

The definitions here see probabilities only, one row at a time, spelled out with autograd. Applied to the
distributions that are merged outside the head they must give the loss and its gradient; applied to the whole
vocabulary they show which side of it a bound lies on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from student.losses.catalogue import catalogue
from student.losses.divergences import coarse
from student.losses.lm_head import HeadTransform
from student.losses.sparse import ReducedLogits, Reduction, SparseTargets, Tempered, token_scale
from student.losses.sparse_pass import sparse_head_loss
from student.objective.terms import Term, reduction, term

TEMPERATURE = 2.0


class Row:
    """One position: merged distributions p, q (the rest last), temperature, label and logits."""

    def __init__(self, log_p_V: Tensor, z_V: Tensor, ids: Tensor, label: int, temperature: float) -> None:
        self.log_p_V, self.z_V, self.ids, self.label = log_p_V, z_V, ids, label
        self.full_p, self.full_q = (log_p_V / temperature).softmax(-1), (z_V / temperature).softmax(-1)
        outside = torch.ones_like(self.full_p, dtype=torch.bool)
        outside[ids] = False
        self.p, self.q = (
            torch.cat([x[ids], x[outside].sum(0, keepdim=True)] if outside.any() else [x[ids]])
            for x in (self.full_p, self.full_q)
        )
        self.bucket = bool(outside.any())
        self.head_p, self.head_q = self.full_p[ids], self.full_q[ids]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def jsd(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p: Tensor, q: Tensor, mu: float = 0.5, bucket: bool = True) -> Tensor:
    best, mass = 0, 0.0
    while mass < mu and best < len(p) - bucket:
        mass, best = mass + p[best].item(), best + 1
    gap = (p - q).abs().detach()
    share = gap[:best].sum() / gap.sum()
    return share * kl(p, q) + (1 - share) * kl(q, p)


def pairs(row: Row, top: int) -> list[Tensor]:
    ids = row.ids[:top]
    return [row.z_V[i] - row.z_V[j] for a, i in enumerate(ids) for j in ids[a + 1 :]]


def mean(values: list[Tensor], row: Row) -> Tensor:
    return torch.stack(values).mean() if values else 0.0 * row.z_V.sum()


def hinge(row: Row, margin: float = 1.0, top: int = 32) -> Tensor:
    return mean([(margin - gap).clamp_min(0) for gap in pairs(row, top)], row)


def logistic(row: Row, top: int = 32) -> Tensor:
    return mean([(1 + (-gap).exp()).log() for gap in pairs(row, top)], row)


def logit_mse(row: Row) -> Tensor:
    gap = row.z_V[row.ids] - row.log_p_V[row.ids]
    return (gap - gap.mean()).square().mean()


def sinkhorn(row: Row, regularisation: float = 0.1, iterations: int = 20, top: int = 32) -> Tensor:
    p, q = row.head_p[:top], row.head_q[:top]
    cost = (p[:, None] - q[None]).abs()
    plan = (-cost / regularisation).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def sorted_gap(row: Row) -> Tensor:
    q = row.full_q.sort(descending=True).values
    k = len(row.ids)
    return (row.head_p - q[:k]).abs().sum() + (row.head_p.sum() - q[:k].sum()).abs()


# On merged distributions, and for a bound on whole ones.
DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "kl": kl,
    "tsld": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": jsd,
    "skew_kl": lambda p, q, alpha=0.1: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, alpha=0.1: kl(q, (1 - alpha) * p + alpha * q),
    "adaptive_kl": adaptive,
    "cakld": lambda p, q, confidence: confidence * kl(q, p) + (1 - confidence) * kl(p, q),
    "tvd": lambda p, q: (p - q).abs().sum() / 2,
}
OTHERS: Mapping[str, Callable[..., Tensor]] = {
    "ce": lambda row: -row.full_q[row.label].log(),
    "top1": lambda row: -row.full_q[row.ids[0]].log(),
    "soft_mse": lambda row: (row.head_p - row.head_q).square().sum(),
    "logit_mse": logit_mse,
    "hinge_ranking": hinge,
    "logistic_ranking": logistic,
    "sinkhorn": sinkhorn,
    "uld": sorted_gap,
    "span_likelihood": lambda row: kl(
        *(torch.stack([p[row.label], 1 - p[row.label]]) for p in (row.full_p, row.full_q))
    ),
    "one_for_all": lambda row, gamma=1.0: (
        -(row.p * row.q.log()).sum()
        - ((1 + row.full_p[row.label]) ** gamma - row.full_p[row.label]) * row.full_q[row.label].log()
    ),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in (*DIVERGENCES, *OTHERS) if name != "cakld"],
    ("cakld", {"confidence": 0.3}),
    *[(name, {"temperature": TEMPERATURE}) for name in ("kl", "reverse_kl", "skew_kl", "skew_reverse_kl")],
    ("jsd", {"beta": 0.1, "temperature": TEMPERATURE}),
    ("skew_kl", {"alpha": 0.6}),
    ("adaptive_kl", {"mu": 0.9, "temperature": TEMPERATURE}),
    ("hinge_ranking", {"margin": 0.3, "top": 3}),
    ("sinkhorn", {"iterations": 3, "top": 4, "temperature": TEMPERATURE}),
]
IDS = [f"{name}{list(options.values()) or ''}" for name, options in CASES]


def test_every_entry_has_a_case() -> None:
    assert {name for name, _ in CASES} == {e.name for e in catalogue().values() if e.kind == "head"}


class Problem:
    """Random float64 teacher and student, and the teacher's sparse side with ragged heads."""

    def __init__(self, n: int, v: int, d: int, k: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, d, generator=draw, dtype=torch.float64)
        self.weight = torch.randn(v, d, generator=draw, dtype=torch.float64) * 3 / math.sqrt(d)
        self.log_p = (torch.randn(n, v, generator=draw, dtype=torch.float64) * 3).log_softmax(-1)
        logprob, ids = self.log_p.topk(k)
        counts = torch.randint(1, k + 1, (n, 1), generator=draw)
        counts[-1] = k
        real = torch.arange(k) < counts
        self.real, self.sequence = real, torch.arange(n) // 3
        label = torch.randint(0, v, (n,), generator=draw)
        label[::2] = ids[::2, 0]
        known = self.log_p.gather(1, label[:, None])[:, 0]
        self.targets = SparseTargets(
            ids_NK=torch.where(real, ids, ids[:, :1]),
            logprob_NK=logprob.masked_fill(~real, -math.inf),
            tail_N=self._outside(logprob, real, v),
            label_N=label,
            label_logprob_N=known,
            token_scale_N=token_scale(known, self.sequence),
            tempered={TEMPERATURE: self._tempered(ids, real)},
        )

    @staticmethod
    def _outside(logprob: Tensor, real: Tensor, vocabulary: int) -> Tensor:
        mass = torch.where(real, logprob.exp(), 0.0).sum(-1)
        return torch.log1p(-mass).masked_fill(real.sum(-1) == vocabulary, -math.inf)

    def _tempered(self, ids: Tensor, real: Tensor) -> Tempered:
        logprob = (self.log_p / TEMPERATURE).log_softmax(-1).gather(1, ids)
        return Tempered(
            logprob.masked_fill(~real, -math.inf), self._outside(logprob, real, self.log_p.shape[1])
        )

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [tensor.to(dtype).requires_grad_() for tensor in (self.hidden, self.weight)]

    def with_draws(self, m: int, seed: int = 0) -> SparseTargets:
        """The same rows with m independent draws from outside the head, every distinct one in one column."""
        draw = torch.Generator().manual_seed(seed)
        n, v = self.log_p.shape
        outside = torch.ones(n, v, dtype=torch.bool).scatter_(1, self.targets.ids_NK, False)
        tail = torch.where(outside, self.log_p, -math.inf)
        ids = self.targets.ids_NK[:, :1].repeat(1, m)
        logprob = torch.full((n, m), -math.inf, dtype=torch.float64)
        for t in range(n):
            drawn = torch.multinomial(tail[t].softmax(-1), m, replacement=True, generator=draw)
            found, count = drawn.unique(return_counts=True)
            ids[t, : len(found)] = found
            logprob[t, : len(found)] = (count.double() / m).log() + self.targets.tail_N[t]
        entropy = -(self.log_p.exp() * self.log_p).sum(-1)
        nothing = torch.full((n, m), -math.inf, dtype=torch.float64)
        tempered = {
            t: Tempered(torch.cat([one.logprob_NK, nothing], 1), one.tail_N)
            for t, one in self.targets.tempered.items()
        }
        return replace(
            self.targets,
            ids_NK=torch.cat([self.targets.ids_NK, ids], 1),
            logprob_NK=torch.cat([self.targets.logprob_NK, logprob], 1),
            tail_N=torch.full_like(self.targets.tail_N, -math.inf),
            entropy_N=entropy,
            draws=m,
            tempered=tempered,
        )

    def rows(self, logits: Tensor, temperature: float) -> list[Row]:
        return [
            Row(log_p, z, ids[real], int(label), temperature)
            for log_p, z, ids, real, label in zip(
                self.log_p, logits, self.targets.ids_NK, self.real, self.targets.label_N, strict=True
            )
        ]


def run(one: Term, inputs: list[Tensor], targets: SparseTargets, chunk: int = 2, **options: Any) -> Any:
    """(differentiable total, values [N])."""
    wanted = reduction([one])
    transform = options.get("transform", HeadTransform())
    bias = inputs[2] if len(inputs) > 2 else None
    terms = [(one.function, 1.0)]
    result = sparse_head_loss(
        hidden_ND=inputs[0],
        weight_VD=inputs[1],
        bias_V=bias,
        targets=targets,
        terms=terms,
        transform=transform,
        chunk=chunk,
        reduction=wanted,
    )
    return result.total, result.terms_SN[0]


def definition(name: str, options: dict[str, Any], problem: Problem, logits: Tensor) -> Tensor:
    """Values [N] by the definitions above, of merged distributions."""
    rest = {key: value for key, value in options.items() if key != "temperature"}
    rows = problem.rows(logits, options.get("temperature", 1.0))
    if name == "adaptive_kl":
        values = torch.stack([adaptive(row.p, row.q, bucket=row.bucket, **rest) for row in rows])
    elif name in DIVERGENCES:
        values = torch.stack([DIVERGENCES[name](row.p, row.q, **rest) for row in rows])
    if name in DIVERGENCES:
        values = values * options.get("temperature", 1.0) ** 2
    else:
        values = torch.stack([OTHERS[name](row, **rest) for row in rows])
    if name == "tsld":
        scores = -problem.targets.label_logprob_N / 10
        same = problem.sequence[:, None] == problem.sequence
        values = values * scores.exp() * same.sum(1) / (same * scores.exp()).sum(1)
    return values


def whole(name: str, options: dict[str, Any], problem: Problem) -> Tensor:
    """Values [N] of the whole distributions, for those that have such a definition."""
    logits = problem.hidden @ problem.weight.t()
    rest = {key: value for key, value in options.items() if key != "temperature"}
    rows = problem.rows(logits, options.get("temperature", 1.0))
    if name in DIVERGENCES:
        factor = options.get("temperature", 1.0) ** 2
        return torch.stack([factor * DIVERGENCES[name](row.full_p, row.full_q, **rest) for row in rows])
    formulas: dict[str, Callable[[Row], Tensor]] = {
        "soft_mse": lambda row: (row.full_p - row.full_q).square().sum(),
        "uld": lambda row: (
            (row.full_p.sort(descending=True).values - row.full_q.sort(descending=True).values).abs().sum()
        ),
        "logit_mse": lambda row: (
            (row.z_V - row.log_p_V - (row.z_V - row.log_p_V).mean()).square().sum() / len(row.ids)
        ),
    }
    return torch.stack([formulas[name](row) for row in rows])


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (7, 11, 5, 11), (13, 203, 9, 8)])
def test_value_and_gradient_are_those_of_the_definition(
    shape: tuple[int, int, int, int], name: str, options: dict[str, Any]
) -> None:
    problem = Problem(*shape)
    inputs = problem.leaves()
    total, values = run(term(name, **options), inputs, problem.targets)
    wanted = definition(name, options, problem, inputs[0] @ inputs[1].t())
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-10, atol=1e-12)
    got, right = torch.autograd.grad(total, inputs), torch.autograd.grad(wanted.sum(), inputs)
    for own, theirs in zip(got, right, strict=True):
        assert (own - theirs).norm() <= 1e-10 * theirs.norm() + 1e-12


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_gradients_are_finite_differences_with_bias_scale_and_softcap(
    name: str, options: dict[str, Any]
) -> None:
    problem = Problem(4, 9, 3, 4, seed=1)
    inputs = [*problem.leaves(), torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()]
    one, transform = term(name, **options), HeadTransform(0.5, 4.0)
    gradients = torch.autograd.grad(run(one, inputs, problem.targets, transform=transform)[0], inputs)
    if name == "adaptive_kl":  # its weight is no part of the gradient, but of a difference
        return
    step = 1e-6
    for index, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [tensor.detach().clone() for tensor in inputs]
                moved[index].view(-1)[place] += sign * step
                ends.append(run(one, moved, problem.targets, transform=transform)[0].item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient.view(-1)[place].item() == pytest.approx(slope, abs=2e-7)


BOUNDS = [
    (n, o) for n, o in CASES if catalogue()[n].exactness == "bound" or ("temperature" in o and n == "kl")
]
BOUNDS += [("kl", {}), ("soft_mse", {})]


@pytest.mark.parametrize(("name", "options"), BOUNDS, ids=[f"{n}{list(o.values()) or ''}" for n, o in BOUNDS])
def test_bounds_lie_below_the_whole_loss_and_close_with_the_head(name: str, options: dict[str, Any]) -> None:
    for seed in range(4):
        problem = Problem(20, 67, 6, 9, seed)
        values = run(term(name, **options), problem.leaves(), problem.targets)[1]
        assert (values <= whole(name, options, problem) + 1e-12).all()
        assert (values >= 0).all() and values.max() > 1e-3
    complete = Problem(6, 23, 6, 23)
    complete.real[:] = True
    logprob, ids = complete.log_p.sort(descending=True)
    nothing = torch.full((6,), -math.inf, dtype=torch.float64)
    tempered = Tempered((complete.log_p / TEMPERATURE).log_softmax(-1).gather(1, ids), nothing)
    complete.targets = replace(
        complete.targets,
        ids_NK=ids,
        logprob_NK=logprob,
        tail_N=nothing,
        tempered={TEMPERATURE: tempered},
    )
    values = run(term(name, **options), complete.leaves(), complete.targets)[1]
    torch.testing.assert_close(values, whole(name, options, complete), rtol=1e-10, atol=1e-12)


MERGING = [
    (n, o)
    for n, o in CASES
    if n not in ("kl", "tsld", "soft_mse", "cakld", "one_for_all") or "temperature" in o
]


@pytest.mark.parametrize(
    ("name", "options"), MERGING, ids=[f"{n}{list(o.values()) or ''}" for n, o in MERGING]
)
def test_draws_change_nothing_where_they_say_nothing(name: str, options: dict[str, Any]) -> None:
    problem = Problem(11, 57, 5, 6)
    results = []
    for targets in (problem.targets, problem.with_draws(9)):
        inputs = problem.leaves()
        total, values = run(term(name, **options), inputs, targets)
        results.append((values, *torch.autograd.grad(total, inputs)))
    for plain, sampled in zip(*results, strict=True):
        torch.testing.assert_close(sampled, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["soft_mse", "kl", "tsld"])
def test_draws_leave_no_bias(name: str) -> None:
    """The mean over seeds lies within five standard errors, in the value and along random directions."""
    problem = Problem(9, 41, 4, 5)
    inputs = problem.leaves()
    logits = inputs[0] @ inputs[1].t()
    exact = torch.stack(
        [
            DIVERGENCES.get(name, lambda p, q: (p - q).square().sum())(r.full_p, r.full_q)
            for r in problem.rows(logits, 1.0)
        ]
    )
    if name == "soft_mse":
        outside = torch.ones_like(problem.log_p).scatter_(1, problem.targets.ids_NK, 0.0)
        exact = exact - (outside * problem.log_p.exp().square()).sum(-1)
    if name == "tsld":
        exact = exact * problem.targets.token_scale_N
    gradient = torch.autograd.grad(exact.sum(), inputs[1])[0]
    directions = torch.randn(8, *gradient.shape, generator=torch.Generator().manual_seed(5)).double()
    found = []
    for seed in range(400):
        weight = problem.weight.clone().requires_grad_()
        total, values = run(term(name), [problem.hidden, weight], problem.with_draws(7, seed), chunk=9)
        slope = torch.autograd.grad(total, weight)[0]
        found.append(torch.cat([values.sum()[None], (directions * slope).sum((1, 2))]))
    wanted = torch.cat([exact.sum().detach()[None], (directions * gradient).sum((1, 2))])
    samples = torch.stack(found)
    error = samples.std(0) / len(found) ** 0.5
    assert (samples.std(0) > 0).all()
    assert ((samples.mean(0) - wanted).abs() <= 5 * error).all()


WIDE: list[tuple[str, dict[str, Any]]] = [
    ("kl", {"temperature": TEMPERATURE}),
    ("reverse_kl", {}),
    ("jsd", {}),
    ("tvd", {}),
    ("soft_mse", {}),
    ("logit_mse", {}),
    ("uld", {}),
]


@pytest.mark.parametrize("vocabulary", [49_152, 262_144])
@pytest.mark.parametrize(("name", "options"), WIDE, ids=[name for name, _ in WIDE])
def test_float32_at_real_vocabularies(name: str, options: dict[str, Any], vocabulary: int) -> None:
    """Logits of size z carry an error of z 2^-24, which exp turns into a relative one of every probability;
    |z| is below 16 here. Sums over V walk at random, for three standard deviations. And log q of a tail that
    holds nearly all mass is a difference of numbers of size one, as is the slope at it: an error of 2^-24
    that small gradients do not share.
    """
    problem = Problem(5, vocabulary, 17, 64)
    exact, single = problem.leaves(), problem.leaves(torch.float32)
    low = lower(problem.targets)
    truth = run(term(name, **options), exact, problem.targets)
    got = run(term(name, **options), single, low)
    unit = 2**-24
    torch.testing.assert_close(got[1].double(), truth[1], rtol=64 * unit, atol=64 * unit)
    walk = (32 + 3 * vocabulary**0.5) * unit
    right, own = torch.autograd.grad(truth[0], exact), torch.autograd.grad(got[0], single)
    rows = problem.weight.norm(dim=1).max() * len(problem.hidden) ** 0.5
    for wanted, found, size in zip(right, own, (rows, problem.hidden.norm()), strict=True):
        assert (found.double() - wanted).norm() <= walk * wanted.norm() + 8 * unit * size


def lower(targets: SparseTargets) -> SparseTargets:
    """The same in float32."""
    return replace(
        targets,
        logprob_NK=targets.logprob_NK.float(),
        tail_N=targets.tail_N.float(),
        tempered={t: Tempered(o.logprob_NK.float(), o.tail_N.float()) for t, o in targets.tempered.items()},
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_sure_teacher_and_a_sure_student_stay_finite(name: str, options: dict[str, Any]) -> None:
    """A tail of no mass, tokens of probability e^-40, and a student that has all its mass elsewhere."""
    logprob = torch.tensor([[0.0, -40.0], [-0.7, -0.7]])
    tempered = Tempered(torch.tensor([[0.0, -20.0], [-0.7, -0.7]]), torch.tensor([-math.inf, -5.0]))
    targets = SparseTargets(
        ids_NK=torch.tensor([[0, 1], [2, 0]]),
        logprob_NK=logprob,
        tail_N=torch.tensor([-math.inf, -5.0]),
        label_N=torch.tensor([0, 3]),
        label_logprob_N=torch.tensor([0.0, -9.0]),
        token_scale_N=torch.ones(2),
        tempered={TEMPERATURE: tempered},
    )
    hidden = torch.tensor([[80.0], [-80.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.5], [0.1], [0.0]], requires_grad=True)
    for sign in (1.0, -1.0):
        inputs = [(sign * hidden).detach().requires_grad_(), weight]
        total, values = run(term(name, **options), inputs, targets)
        assert values.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, inputs))


def test_a_reduction_asks_for_nothing_that_no_term_wants() -> None:
    assert reduction([term("kl"), term("ce")]) == Reduction()
    wanted = reduction([term("kl", temperature=2.0), term("jsd", temperature=2.0), term("soft_mse")])
    assert wanted == Reduction((0.5, 2.0), False)


def test_merged_distributions_sum_to_one() -> None:
    problem, seen = Problem(9, 31, 4, 5), []

    def keep(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
        seen.extend(x.exp().sum(-1) for x in coarse(student, teacher))
        return student.tail_N

    for targets in (problem.targets, problem.with_draws(6)):
        sparse_head_loss(
            hidden_ND=problem.hidden,
            weight_VD=problem.weight,
            bias_V=None,
            targets=targets,
            terms=[(keep, 1.0)],
            transform=HeadTransform(),
        )
    assert len(seen) == 4
    for sums in seen:
        torch.testing.assert_close(sums, torch.ones(9, dtype=torch.float64), rtol=1e-9, atol=0)
