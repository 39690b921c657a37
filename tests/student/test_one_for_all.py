"""The one-for-all loss of an intermediate state through a projector and somebody else's head, in full."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from student.losses.sparse import SparseTargets, one_for_all
from student.losses.sparse_pass import HeadTransform, sparse_head_loss


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("columns", [4, 11])
def test_value_and_gradient_are_those_of_the_dense_formula(gamma: float, columns: int) -> None:
    """The teacher's mass outside the columns is one outcome, as is the student's."""
    torch.manual_seed(0)
    positions, vocab = 6, 11
    logprob = torch.randn(positions, vocab, dtype=torch.float64).mul(2).log_softmax(-1)
    label = torch.randint(vocab, (positions,))
    states = torch.randn(positions, 5, dtype=torch.float64, requires_grad=True)
    projector, head = torch.randn(5, 7, dtype=torch.float64), torch.randn(vocab, 7, dtype=torch.float64)
    top, ids = logprob.topk(columns, dim=-1)
    outside = (1 - top.exp().sum(-1)).clamp_min(0) if columns < vocab else torch.zeros(positions).double()
    known = logprob.gather(1, label[:, None])[:, 0]
    targets = SparseTargets(
        ids_NK=ids, logprob_NK=top, tail_N=outside.log(), label_N=label, label_logprob_N=known
    )

    loss = (partial(one_for_all, gamma=gamma), 1.0)
    got = sparse_head_loss(
        hidden_ND=states @ projector,
        weight_VD=head,
        bias_V=None,
        targets=targets,
        terms=[loss],
        transform=HeadTransform(),
        chunk=4,
    )
    (gradient,) = torch.autograd.grad(got.total, states)

    log_q = (states @ projector @ head.T).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(positions):
        inside = ids[n].tolist()
        total = total - sum(logprob[n, v].exp() * log_q[n, v] for v in inside)
        if columns < vocab:
            total = total - outside[n] * (1 - log_q[n, inside].exp().sum()).log()
        p = known[n].exp()
        total = total - ((1 + p) ** gamma - p) * log_q[n, label[n]]
    (wanted,) = torch.autograd.grad(total, states)
    torch.testing.assert_close(got.total, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-9)


def test_a_label_that_the_cache_does_not_know_weighs_one() -> None:
    head = torch.randn(5, 3, dtype=torch.float64)
    states = torch.randn(2, 3, dtype=torch.float64)
    top, ids = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1).topk(5, dim=-1)
    closed, label = torch.full((2,), -torch.inf, dtype=torch.float64), torch.tensor([1, 2])
    unknown = torch.full((2,), torch.nan, dtype=torch.float64)
    targets = SparseTargets(ids_NK=ids, logprob_NK=top, tail_N=closed, label_N=label, label_logprob_N=unknown)
    got = sparse_head_loss(
        hidden_ND=states,
        weight_VD=head,
        bias_V=None,
        targets=targets,
        terms=[(partial(one_for_all, gamma=2.0), 1.0)],
        transform=HeadTransform(),
    )
    log_q = (states @ head.T).log_softmax(-1)
    wanted = -(top.exp() * log_q.gather(1, ids)).sum() - log_q.gather(1, label[:, None]).sum()
    torch.testing.assert_close(got.total, wanted)
