"""The gradient of an exact head and a sampled tail is, on average, that of the full distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.format.tail import row_shifts
from pipeline.capture.packing import logit_fields, to_features
from pipeline.capture.reduce import reduce_logits
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, cross_entropy, forward_kl
from student.losses.sparse_pass import sparse_head_loss
from tests.student.reference import targets_of

ROWS, VOCAB, WIDTH = 24, 997, 6


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Teacher logits [N, V], and the student's hidden states and head, all float64."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * 2
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return teacher, hidden, torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)


def targets(teacher: Tensor, tail: int, seed: int) -> SparseTargets:
    """Through the capture's own reduction, without the rounding of the store."""
    shifts = torch.from_numpy(row_shifts(np.arange(ROWS), 0, ROWS, seed))
    labels = torch.zeros(ROWS, dtype=torch.long)
    fields = logit_fields(
        reduce_logits(logits_NV=teacher, labels_N=labels, top_k=8, top_p=0.5, tail=tail, shifts_N=shifts)
    )
    spec = LogitsSpec(8, 0.5, tail, seed if tail else 0)
    features = to_features({name: t.numpy() for name, t in fields.items()}, (spec,))[spec]
    assert isinstance(features, LogitsFeatures)
    return targets_of(features, labels)


def loss_and_gradient(hidden: Tensor, weight: Tensor, wanted: SparseTargets) -> tuple[float, Tensor]:
    leaf = weight.clone().requires_grad_()
    loss = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=leaf,
        bias_V=None,
        targets=wanted,
        terms=[(forward_kl, 1.0)],
        transform=HeadTransform(),
    ).total
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def exact(teacher: Tensor, hidden: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """KL over the whole vocabulary in float64, and its gradient by autograd."""
    leaf = weight.clone().requires_grad_()
    log_p, log_q = teacher.log_softmax(-1), (hidden @ leaf.t()).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def test_the_mean_over_seeds_approaches_the_exact_loss_and_gradient() -> None:
    """The error of the mean of n seeds falls like 1 / sqrt(n)."""
    teacher, hidden, weight = problem()
    value, gradient = exact(teacher, hidden, weight)
    found = [loss_and_gradient(hidden, weight, targets(teacher, 12, seed)) for seed in range(1024)]
    gradients = torch.stack([g for _, g in found])
    single = (gradients - gradient).flatten(1).norm(dim=1).square().mean().sqrt()
    for n in (16, 64, 256, 1024):
        groups = gradients[: 1024 // n * n].unflatten(0, (-1, n)).mean(1)
        error = (groups - gradient).flatten(1).norm(dim=1).square().mean().sqrt()
        assert error.item() == pytest.approx(single.item() / n**0.5, rel=0.35), n
    values = np.array([v for v, _ in found])
    assert abs(values.mean() - value) < 4 * values.std() / 1024**0.5


def test_the_bucket_alone_is_biased() -> None:
    """What the draws are for: without them the error does not average out."""
    teacher, hidden, weight = problem()
    gradient = exact(teacher, hidden, weight)[1]
    bucket = loss_and_gradient(hidden, weight, targets(teacher, 0, 0))[1]
    sampled = [loss_and_gradient(hidden, weight, targets(teacher, 12, seed))[1] for seed in range(64)]
    assert (torch.stack(sampled).mean(0) - gradient).norm() < 0.2 * (bucket - gradient).norm()


def test_gradient_is_q_minus_the_sparse_target_in_float64() -> None:
    teacher, hidden, weight = problem()
    wanted = targets(teacher, 12, 5)
    dense = torch.zeros(ROWS, VOCAB, dtype=torch.float64)
    dense.scatter_add_(1, wanted.ids_NK, wanted.logprob_NK.exp())
    assert torch.allclose(dense.sum(-1), torch.ones(ROWS, dtype=torch.float64), atol=1e-5)
    q = (hidden @ weight.t()).softmax(-1)
    gradient = (q * dense.sum(-1, keepdim=True) - dense).t() @ hidden
    found = loss_and_gradient(hidden, weight, wanted)[1]
    assert (found - gradient).norm() <= 1e-12 * gradient.norm()


def test_a_mixed_batch_keeps_the_bucket_where_nothing_was_drawn() -> None:
    teacher, hidden, weight = problem()
    plain, sampled = targets(teacher, 0, 0), targets(teacher, 12, 5)
    assert sampled.entropy_N is not None
    width = plain.ids_NK.shape[1]
    sampled.entropy_N[::2] = torch.nan
    sampled.tail_N[::2] = plain.tail_N[::2]
    sampled.logprob_NK[::2, width:] = -torch.inf
    sampled.ids_NK[::2, width:] = sampled.ids_NK[::2, :1]
    terms = [(forward_kl, 1.0), (cross_entropy, 0.0)]
    mixed, alone = (
        sparse_head_loss(
            hidden_ND=hidden,
            weight_VD=weight,
            bias_V=None,
            targets=t,
            terms=terms,
            transform=HeadTransform(),
            chunk=7,
        ).terms_SN
        for t in (sampled, plain)
    )
    assert torch.allclose(mixed[:, ::2], alone[:, ::2], rtol=1e-12)
    assert (mixed[0, 1::2] > alone[0, 1::2]).float().mean() > 0.9, "the bucket is a lower bound"
