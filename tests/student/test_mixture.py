"""The mixture of several teachers' sparse distributions, against dense mixtures in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.format.tail import row_shifts
from pipeline.capture.packing import logit_fields, to_features
from pipeline.capture.reduce import reduce_logits
from student.data.mixture import mixed_logs, mixture
from student.losses.catalogue import catalogue
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, token_scale
from student.losses.sparse_pass import sparse_head_loss
from student.objective.terms import reduction, term
from tests.student.reference import targets_of
from tests.student.test_host_syncs import Functions, Operations

EPS = torch.finfo(torch.float64).eps


class Problem:
    """Teachers' logits [N, V], which share a part, and a student's hidden states and head; float64."""

    def __init__(self, rows: int, vocab: int, weights: tuple[float, ...]) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared = 2 * normal(rows, vocab)
        self.weights = weights
        self.logits = [shared + normal(rows, vocab) for _ in weights]
        self.hidden, self.weight = normal(rows, 5), normal(vocab, 5)
        self.label = torch.randint(vocab, (rows,), generator=generator)

    def targets(self, specs: list[LogitsSpec]) -> list[SparseTargets]:
        """Of each teacher, through the capture's own reduction, without the rounding of the store."""
        return [self._reduced(z, spec) for z, spec in zip(self.logits, specs, strict=True)]

    def _reduced(self, logits: Tensor, spec: LogitsSpec) -> SparseTargets:
        rows = len(logits)
        shifts = torch.from_numpy(row_shifts(np.arange(rows), 0, rows, spec.seed))
        fields = logit_fields(
            reduce_logits(
                logits_NV=logits,
                labels_N=self.label,
                top_k=spec.top_k,
                top_p=spec.top_p,
                tail=spec.tail,
                shifts_N=shifts,
            )
        )
        features = to_features({name: t.numpy() for name, t in fields.items()}, (spec,))[spec]
        assert isinstance(features, LogitsFeatures)
        return targets_of(features, self.label)

    def loss(self, targets: SparseTargets, name: str = "kl") -> tuple[Tensor, Tensor]:
        """Values [N] and the gradient of their sum with respect to the head's weights [V, 5]."""
        leaf, one = self.weight.clone().requires_grad_(), term(name)
        known = mixed_logs(
            [z.log_softmax(-1).gather(1, self.label[:, None])[:, 0] for z in self.logits], self.weights
        )
        scale = token_scale(known, torch.zeros_like(self.label))
        found = sparse_head_loss(
            hidden_ND=self.hidden,
            weight_VD=leaf,
            bias_V=None,
            targets=replace(targets, label_logprob_N=known, token_scale_N=scale),
            terms=[(one.function, 1.0)],
            transform=HeadTransform(),
            reduction=reduction([one]),
        )
        return found.terms_SN[0], torch.autograd.grad(found.total, leaf)[0]

    def exact(self) -> tuple[Tensor, Tensor]:
        """sum of w_i KL(p_i || q) over the whole vocabulary, [N], and the gradient of KL(mixture || q)."""
        leaf = self.weight.clone().requires_grad_()
        log_q = (self.hidden @ leaf.t()).log_softmax(-1)
        every = [z.log_softmax(-1) for z in self.logits]
        kl = sum(w * (p.exp() * (p - log_q)).sum(-1) for w, p in zip(self.weights, every, strict=True))
        mixed = mixed_logs(every, self.weights)
        of_mixture = (mixed.exp() * (mixed - log_q)).sum()
        assert isinstance(kl, Tensor)
        return kl.detach(), torch.autograd.grad(of_mixture, leaf)[0]


def dense(parts: list[SparseTargets], weights: tuple[float, ...], vocab: int) -> Tensor:
    """sum of w_i m_i, [N, V], spelled out."""
    out = torch.zeros(len(parts[0].label_N), vocab, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        out.scatter_add_(1, part.ids_NK, weight * part.logprob_NK.exp())
    return out


SHAPES = [(7, 31, (0.5, 0.5)), (3, 199, (0.2, 0.3, 0.5)), (2, 49_152, (0.7, 0.3))]


@pytest.mark.parametrize(("rows", "vocab", "weights"), SHAPES)
def test_whole_heads_give_the_mixture_itself(rows: int, vocab: int, weights: tuple[float, ...]) -> None:
    problem = Problem(rows, vocab, weights)
    targets = mixture(problem.targets([LogitsSpec(vocab)] * len(weights)), weights)
    value, gradient = problem.loss(targets)
    wanted, exact = problem.exact()
    # The capture hands over float32, of logits below 16 in size.
    tolerance = 16 * torch.finfo(torch.float32).eps
    assert (value - wanted).abs().max() <= tolerance * 2 * wanted.abs().max()
    assert (gradient - exact).norm() <= 2 * tolerance * exact.norm() * vocab**0.5


@pytest.mark.parametrize(("rows", "vocab", "weights"), SHAPES)
def test_columns_are_the_sum_of_the_parts_and_no_token_is_in_two(
    rows: int, vocab: int, weights: tuple[float, ...]
) -> None:
    """Heads of different widths that overlap, draws inside another's head, and a head that is whole."""
    problem = Problem(rows, vocab, weights)
    specs = [LogitsSpec(9, 0.6, 5), LogitsSpec(4, 0.9, 6, seed=3), LogitsSpec(vocab)]
    parts = problem.targets(specs[-len(weights) :])
    found = mixture(parts, weights)
    real = torch.isfinite(found.logprob_NK)
    for ids, known in zip(found.ids_NK, real, strict=True):
        assert ids[known].unique().numel() == int(known.sum()) and (ids[~known] == ids[0]).all()
    wanted = dense(parts, weights, vocab)
    columns = torch.zeros_like(wanted).scatter_add_(1, found.ids_NK, found.logprob_NK.exp())
    assert (columns - wanted).abs().max() <= 4 * EPS
    heads = [replace(part, logprob_NK=part.logprob_NK.masked_fill(~_head(part), -math.inf)) for part in parts]
    assert torch.equal(found.ids_NK[:, 0], dense(heads, weights, vocab).argmax(-1))
    gradient = problem.loss(found)[1]
    q = (problem.hidden @ problem.weight.t()).softmax(-1)
    tail = found.tail_N.exp().unsqueeze(-1)  # what float32 leaves beside whole heads, and no more
    assert (tail < 1e-5).all()
    exact = (q * wanted.sum(-1, keepdim=True) - wanted).t() @ problem.hidden
    assert (gradient - exact).norm() <= 1e-12 * exact.norm() + tail.sum() * problem.hidden.norm()


def _head(part: SparseTargets) -> Tensor:
    return torch.arange(part.ids_NK.shape[1]) < part.head_columns


@pytest.mark.parametrize("seeds", [(0, 0), (0, 10_000)], ids=["same draws", "other draws"])
@pytest.mark.parametrize(("vocab", "count"), [(997, 512), (49_152, 32)])
def test_the_mean_over_draws_is_the_mixture(vocab: int, count: int, seeds: tuple[int, int]) -> None:
    """Three standard errors of a mean of `count`, of values and of gradients as a whole; also where teachers
    are captured with one seed, so that their draws depend on each other.
    """
    problem = Problem(3, vocab, (0.6, 0.4))
    wanted, exact = problem.exact()
    values, gradients = [], []
    for seed in range(count):
        specs = [LogitsSpec(8, 0.5, 6, seeds[0] + seed), LogitsSpec(5, 0.7, 4, seeds[1] + seed)]
        value, gradient = problem.loss(mixture(problem.targets(specs), problem.weights))
        values.append(value.sum())
        gradients.append(gradient)
    every = torch.stack(gradients)
    spread = (every - every.mean(0)).flatten(1).norm(dim=1).square().sum().div(count - 1).sqrt()
    assert (every.mean(0) - exact).norm() <= 3 * spread / count**0.5
    assert (torch.stack(values).mean() - wanted.sum()).abs() <= 3 * torch.stack(values).std() / count**0.5
    assert spread > 0.05 * exact.norm(), "nothing was drawn"


@pytest.mark.parametrize("name", [name for name, loss in catalogue().items() if loss.mixes])
def test_losses_that_mix_are_linear_in_the_columns(name: str) -> None:
    """Their gradient is that of the same loss on the sparse measure spread over the whole vocabulary, and
    that is linear: so the mean over draws is the loss of the mixture.
    """
    problem = Problem(5, 61, (0.3, 0.7))
    parts = problem.targets([LogitsSpec(6, 0.6, 5), LogitsSpec(9, 0.8, 4, seed=2)])
    whole = [_whole(dense([part], (1.0,), 61), problem.label) for part in parts]
    gradient = problem.loss(mixture(parts, problem.weights), name)[1]
    together = problem.loss(_whole(dense(parts, problem.weights, 61), problem.label), name)[1]
    assert (gradient - together).norm() <= 1e-12 * together.norm()
    # Linear but for what does not depend on p: f(sum w p) = sum w f(p), since the weights are 1 together.
    one_by_one = sum(w * problem.loss(one, name)[1] for w, one in zip(problem.weights, whole, strict=True))
    assert isinstance(one_by_one, Tensor)
    assert (gradient - one_by_one).norm() <= 1e-12 * together.norm()


def test_soft_mse_leaves_a_constant_out() -> None:
    """sum of (p - q)^2 less sum of p^2, which squares of draws do not estimate."""
    problem = Problem(5, 61, (0.3, 0.7))
    parts = problem.targets([LogitsSpec(6, 0.6, 5), LogitsSpec(9, 0.8, 4, seed=2)])
    q = (problem.hidden @ problem.weight.t()).softmax(-1)
    wanted = (q * q - 2 * q * dense(parts, problem.weights, 61)).sum(-1)
    found = problem.loss(mixture(parts, problem.weights), "soft_mse")[0]
    assert (found - wanted).abs().max() <= 1e-12


def _whole(p_NV: Tensor, label: Tensor) -> SparseTargets:
    ids = torch.arange(p_NV.shape[1]).expand_as(p_NV)
    # Columns that seem impossible have to be real ones.
    logprob = p_NV.clamp_min(1e-300).log()
    return SparseTargets(
        ids_NK=ids, logprob_NK=logprob, tail_N=torch.full((len(p_NV),), -math.inf), label_N=label
    )


def test_other_losses_are_not() -> None:
    """What is refused would be wrong: at least the gradient of each is not linear in p."""
    problem = Problem(5, 61, (0.3, 0.7))
    parts = [_whole(z.softmax(-1), problem.label) for z in problem.logits]
    mixed = _whole(
        mixed_logs([z.log_softmax(-1) for z in problem.logits], problem.weights).exp(), problem.label
    )
    refused = [n for n, loss in catalogue().items() if loss.kind == "head" and loss.needs and not loss.mixes]
    assert len(refused) > 10
    for name in refused:
        if name == "cakld":  # its confidence comes from a cache
            continue
        order = [replace(p, **_sorted(p)) for p in (*parts, mixed)]
        found = [problem.loss(one, name)[1] for one in order]
        linear = problem.weights[0] * found[0] + problem.weights[1] * found[1]
        assert (linear - found[2]).norm() > 1e-3 * found[2].norm(), name


def _sorted(part: SparseTargets) -> dict[str, Tensor]:
    """Columns best first, as a cache has them."""
    logprob, order = part.logprob_NK.sort(descending=True, stable=True)
    return {"logprob_NK": logprob, "ids_NK": part.ids_NK.gather(1, order)}


def test_no_rows_and_rows_of_one_column() -> None:
    one = SparseTargets(
        ids_NK=torch.tensor([[4]]),
        logprob_NK=torch.zeros(1, 1),
        tail_N=torch.full((1,), -math.inf),
        label_N=torch.tensor([4]),
    )
    found = mixture([one, replace(one, ids_NK=torch.tensor([[2]]))], (0.25, 0.75))
    assert found.ids_NK.tolist() == [[2, 4]]
    torch.testing.assert_close(found.logprob_NK.exp(), torch.tensor([[0.75, 0.25]]))
    assert found.entropy_N is not None and found.entropy_N.tolist() == [0.0]
    same = mixture([one, one, one], (0.25, 0.25, 0.5))
    assert same.logprob_NK[0, 0] == 0 and torch.isneginf(same.logprob_NK[0, 1:]).all()
    empty = mixture([one.slice(0, 0), one.slice(0, 0)], (0.5, 0.5))
    assert empty.ids_NK.shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    problem = Problem(6, 199, (0.2, 0.3, 0.5))
    parts = problem.targets([LogitsSpec(9, 0.6, 5), LogitsSpec(4, 0.9, 6, seed=3), LogitsSpec(12, 0.7, 3)])
    here, names = mixture(parts, problem.weights), ("ids_NK", "logprob_NK", "tail_N", "label_N", "entropy_N")
    moved = [replace(part, **{name: getattr(part, name).cuda() for name in names}) for part in parts]
    there = mixture(moved, problem.weights)
    assert torch.equal(here.ids_NK, there.ids_NK.cpu())
    torch.testing.assert_close(here.logprob_NK, there.logprob_NK.cpu())


def test_the_kl_of_a_mixture_is_the_mean_of_its_teachers() -> None:
    """Row by row, and from draws: the entropy that stands in for the mixture's is that of the teachers."""
    problem = Problem(4, 83, (0.3, 0.7))
    parts = problem.targets([LogitsSpec(6, 0.6, 5), LogitsSpec(83)])
    found = problem.loss(mixture(parts, problem.weights))[0]
    each = [problem.loss(part)[0] for part in parts]
    wanted = problem.weights[0] * each[0] + problem.weights[1] * each[1]
    # The head that is whole leaves a rounding of float32 outside, which is no token.
    assert (found - wanted).abs().max() <= 1e-5


def test_the_host_waits_for_nothing() -> None:
    """A training step mixes on its device."""
    problem, found = Problem(4, 83, (0.3, 0.7)), list[str]()
    parts = problem.targets([LogitsSpec(6, 0.6, 5), LogitsSpec(9, 0.7, 4)])
    with Functions(found), Operations(found):
        mixture(parts, problem.weights)
    assert found == []
