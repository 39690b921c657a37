"""Losses over the full vocabulary against plain float64 formulas on all logits and their autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from student.losses import full, full_pass
from student.losses.full import DenseLoss
from student.losses.full_pass import DenseTargets, TeacherHead, dense_head_loss, fisher_diagonal, fisher_mse
from student.losses.lm_head import HeadTransform
from tests.student.allocations import allocated_at_most

Plain = Callable[[Tensor, Tensor], Tensor]  # (student z, teacher t) -> value [N]


def soft(z: Tensor, t: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    return (t / tau).softmax(-1), (z / tau).softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def plain_forward(z: Tensor, t: Tensor, tau: float = 1.0) -> Tensor:
    return tau**2 * kl(*soft(z, t, tau))


def plain_reverse(z: Tensor, t: Tensor, tau: float = 1.0) -> Tensor:
    p, q = soft(z, t, tau)
    return tau**2 * kl(q, p)


def plain_jsd(z: Tensor, t: Tensor, beta: float, tau: float = 1.0) -> Tensor:
    p, q = soft(z, t, tau)
    m = beta * p + (1 - beta) * q
    return tau**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def plain_skew(z: Tensor, t: Tensor, alpha: float) -> Tensor:
    p, q = soft(z, t, 1.0)
    return kl(p, alpha * p + (1 - alpha) * q)


def plain_skew_reverse(z: Tensor, t: Tensor, alpha: float) -> Tensor:
    p, q = soft(z, t, 1.0)
    return kl(q, (1 - alpha) * p + alpha * q)


def plain_adaptive(z: Tensor, t: Tensor, mass: float) -> Tensor:
    """Row by row: the head by a full sort, its weight without gradient."""
    p, q = soft(z, t, 1.0)
    values = []
    for p_V, q_V in zip(p, q, strict=True):
        order = p_V.argsort(descending=True)
        size = 1 + int((p_V[order].cumsum(0) < mass - 1e-15).sum())
        gap = (p_V - q_V).detach().abs()
        share = gap[order[:size]].sum() / gap.sum()
        values.append(share * kl(p_V, q_V) + (1 - share) * kl(q_V, p_V))
    return torch.stack(values)


def plain_confidence(z: Tensor, t: Tensor, c: float = 0.3) -> Tensor:
    p, q = soft(z, t, 1.0)
    return c * kl(q, p) + (1 - c) * kl(p, q)


def plain_tvd(z: Tensor, t: Tensor) -> Tensor:
    p, q = soft(z, t, 1.0)
    return (p - q).abs().sum(-1) / 2


def plain_soft_mse(z: Tensor, t: Tensor) -> Tensor:
    p, q = soft(z, t, 1.0)
    return (p - q).square().sum(-1)


def plain_mse(z: Tensor, t: Tensor) -> Tensor:
    return (z - t).square().mean(-1)


def plain_centred(z: Tensor, t: Tensor) -> Tensor:
    return ((z - z.mean(-1, True)) - (t - t.mean(-1, True))).square().mean(-1)


def plain_fisher(z: Tensor, t: Tensor) -> Tensor:
    p = t.softmax(-1)
    fisher = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    gap = (z - t).unsqueeze(-1)
    return (gap.transpose(-1, -2) @ fisher @ gap).flatten() / 2


LOSSES: dict[str, tuple[DenseLoss, Plain]] = {
    "forward": (full.forward_kl, plain_forward),
    "forward at 3": (partial(full.forward_kl, temperature=3.0), partial(plain_forward, tau=3.0)),
    "reverse": (full.reverse_kl, plain_reverse),
    "reverse at 0.5": (partial(full.reverse_kl, temperature=0.5), partial(plain_reverse, tau=0.5)),
    "jsd": (full.jsd, partial(plain_jsd, beta=0.5)),
    "jsd 0.1 at 2": (
        partial(full.jsd, beta=0.1, temperature=2.0),
        partial(plain_jsd, beta=0.1, tau=2.0),
    ),
    "skew": (full.skew_kl, partial(plain_skew, alpha=0.1)),
    "skew 0.7": (partial(full.skew_kl, alpha=0.7), partial(plain_skew, alpha=0.7)),
    "skew reverse": (full.skew_reverse_kl, partial(plain_skew_reverse, alpha=0.1)),
    "skew reverse 0.7": (
        partial(full.skew_reverse_kl, alpha=0.7),
        partial(plain_skew_reverse, alpha=0.7),
    ),
    "adaptive": (full.adaptive_kl, partial(plain_adaptive, mass=0.5)),
    "adaptive 0.999": (
        partial(full.adaptive_kl, mu=0.999),
        partial(plain_adaptive, mass=0.999),
    ),
    "confidence": (partial(full.confidence_kl, confidence=0.3), plain_confidence),
    "tvd": (full.total_variation, plain_tvd),
    "soft mse": (full.soft_mse, plain_soft_mse),
    "logit mse": (full.logit_mse, plain_mse),
    "centred": (full.centred_logit_mse, plain_centred),
}
SMALL = LOSSES | {"fisher": (full.fisher_logit_mse, plain_fisher)}  # the reference holds N x V x V
TRANSFORMS = [HeadTransform(), HeadTransform(0.5), HeadTransform(2.0, 5.0)]


def problem(n: int, v: int, d_s: int, d_t: int, seed: int = 0) -> dict[str, Tensor]:
    """Float64 states and heads of a student (D = d_s) and a teacher (D = d_t)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": randn(n, d_s),
        "weight": randn(v, d_s) * 3 / math.sqrt(d_s),
        "bias": randn(v),
        "teacher_hidden": randn(n, d_t),
        "teacher_weight": randn(v, d_t) * 3 / math.sqrt(d_t),
    }


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> Tensor:
    z = (
        hidden @ weight.t() * transform.scale
        if bias is None
        else (hidden @ weight.t() + bias) * transform.scale
    )
    return transform.softcap * torch.tanh(z / transform.softcap) if transform.softcap else z


def targets_of(parts: dict[str, Tensor], dtype: torch.dtype, transform: HeadTransform) -> DenseTargets:
    hidden, weight = (parts[name].to(dtype) for name in ("teacher_hidden", "teacher_weight"))
    return DenseTargets(TeacherHead(weight, None, transform), hidden)


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (7, 11, 5, 3), (13, 203, 4, 9)])
@pytest.mark.parametrize("name", SMALL)
def test_float64_matches_to_rounding(
    name: str, shape: tuple[int, int, int, int], transform: HeadTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, and a row or two at a time."""
    loss, plain = SMALL[name]
    monkeypatch.setitem(full_pass.BLOCK_ELEMENTS, "cpu", shape[1])
    parts, own = problem(*shape), HeadTransform(1.5, 7.0)
    inputs = leaves([parts["hidden"], parts["weight"], parts["bias"]], torch.float64)
    goal = head_of(parts["teacher_hidden"], parts["teacher_weight"], None, transform)
    wanted_N = plain(head_of(*inputs, own), goal)
    wanted = torch.autograd.grad(0.7 * wanted_N.sum(), inputs)
    total, terms_SN = dense_head_loss(
        *inputs, targets_of(parts, torch.float64, transform), [(loss, 0.7)], own, max(1, shape[0] // 3)
    )
    torch.testing.assert_close(terms_SN[0], wanted_N.detach(), rtol=1e-11, atol=1e-13)
    assert total.item() == pytest.approx(0.7 * wanted_N.sum().item(), rel=1e-11)
    for gradient, right in zip(torch.autograd.grad(total, inputs), wanted, strict=True):
        assert (gradient - right).norm() <= 1e-11 * right.norm() + 1e-14


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"adaptive", "adaptive 0.999"}))  # constant weights
def test_gradients_are_finite_differences(name: str) -> None:
    parts = problem(4, 9, 3, 2)
    inputs = leaves([parts["hidden"], parts["weight"], parts["bias"]], torch.float64)
    targets = targets_of(parts, torch.float64, HeadTransform(0.5, 6.0))

    def total(*tensors: Tensor) -> Tensor:
        return dense_head_loss(*tensors, targets, [(SMALL[name][0], 1.0)], HeadTransform(0.5, 4.0), 3)[0]

    step = 1e-6
    for index, gradient in enumerate(torch.autograd.grad(total(*inputs), inputs)):
        for place in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [tensor.detach().clone() for tensor in inputs]
                moved[index].view(-1)[place] += sign * step
                values.append(total(*moved).item())
            slope = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[place].item() == pytest.approx(slope, abs=1e-7)


def test_terms_share_a_pass_with_their_weights() -> None:
    parts = problem(9, 31, 4, 6)
    inputs = leaves([parts["hidden"], parts["weight"]], torch.float64)
    targets = targets_of(parts, torch.float64, HeadTransform())
    terms = [(loss, 0.1 * (index + 1)) for index, (loss, _) in enumerate(SMALL.values())]
    total, terms_SN = dense_head_loss(
        hidden_ND=inputs[0],
        weight_VD=inputs[1],
        bias_V=None,
        targets=targets,
        terms=terms,
        transform=HeadTransform(),
        chunk=4,
    )
    goal = head_of(parts["teacher_hidden"], parts["teacher_weight"], None, HeadTransform())
    z = inputs[0] @ inputs[1].t()
    wanted_SN = torch.stack([plain(z, goal) for _, plain in SMALL.values()])
    wanted = torch.tensor([weight for _, weight in terms], dtype=torch.float64) @ wanted_SN.sum(-1)
    torch.testing.assert_close(terms_SN, wanted_SN.detach(), rtol=1e-11, atol=1e-13)
    for gradient, right in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert (gradient - right).norm() <= 1e-11 * right.norm() + 1e-14


@pytest.mark.parametrize("vocabulary", [49_152, 262_144])
@pytest.mark.parametrize("name", LOSSES)
def test_float32_at_real_vocabularies(name: str, vocabulary: int) -> None:
    """As near to float64 as the plain formula in float32, up to the order of the sums over V.

    V roundings of 2^-24 of a partial sum, which is at most the sum of absolute terms, walk at random: three
    standard deviations.
    """
    loss, plain = LOSSES[name]
    parts = problem(2, vocabulary, 5, 7)
    walk = 3 * vocabulary**0.5 * 2**-24
    z_t = head_of(parts["teacher_hidden"], parts["teacher_weight"], None, HeadTransform())
    exact, single = (leaves([parts["hidden"], parts["weight"]], d) for d in (torch.float64, torch.float32))
    z = exact[0] @ exact[1].t()
    truth_N = plain(z, z_t)
    dz, *right = torch.autograd.grad(truth_N.sum(), [z, *exact])
    low_t = parts["teacher_hidden"].float() @ parts["teacher_weight"].float().t()
    plain_N = plain(single[0] @ single[1].t(), low_t)
    theirs = torch.autograd.grad(plain_N.sum(), single)
    targets = targets_of(parts, torch.float32, HeadTransform())
    total, terms_SN = dense_head_loss(
        hidden_ND=single[0],
        weight_VD=single[1],
        bias_V=None,
        targets=targets,
        terms=[(loss, 1.0)],
        transform=HeadTransform(),
        chunk=1,
    )
    assert (terms_SN[0] - truth_N).norm() <= 2 * (plain_N - truth_N).norm() + walk * truth_N.norm()
    sizes = [dz.abs() @ exact[1].detach().abs(), dz.abs().t() @ exact[0].detach().abs()]
    gradients = torch.autograd.grad(total, single)
    for own, low, wanted, size in zip(gradients, theirs, right, sizes, strict=True):
        assert (own - wanted).norm() <= 2 * (low - wanted).norm() + walk * size.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_as_good_as_a_plain_bfloat16_head(name: str) -> None:
    """Under autocast the gradient is no worse than that of both sides' bfloat16 logits with the loss in
    float32.
    """
    loss, plain = LOSSES[name]
    parts = problem(48, 503, 64, 32)
    exact = leaves([parts["hidden"], parts["weight"]], torch.float64)
    z_t = head_of(parts["teacher_hidden"], parts["teacher_weight"], None, HeadTransform())
    truth = plain(exact[0] @ exact[1].t(), z_t)
    right = torch.autograd.grad(truth.sum(), exact)
    half, single = leaves(exact, torch.bfloat16), leaves(exact, torch.float32)
    low_t = parts["teacher_hidden"].bfloat16() @ parts["teacher_weight"].bfloat16().t()
    rough = plain((half[0] @ half[1].t()).float(), low_t.float())
    theirs = torch.autograd.grad(rough.sum(), half)
    targets = targets_of(parts, torch.float32, HeadTransform())
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = dense_head_loss(
            hidden_ND=single[0],
            weight_VD=single[1],
            bias_V=None,
            targets=targets,
            terms=[(loss, 1.0)],
            transform=HeadTransform(),
            chunk=20,
        )
    assert total.dtype == torch.float32
    for own, low, wanted in zip(torch.autograd.grad(total, single), theirs, right, strict=True):
        assert (own - wanted).norm() <= 1.1 * (low.double() - wanted).norm()


def test_padding_of_the_students_vocabulary_is_outside() -> None:
    parts = problem(6, 40, 4, 3)
    targets = targets_of(parts, torch.float64, HeadTransform())
    weight = torch.cat([parts["weight"], torch.full((5, 4), 9.0).double()]).requires_grad_()
    bias = torch.zeros(45).double().requires_grad_()
    hidden = parts["hidden"].requires_grad_()
    terms = [(full.reverse_kl, 1.0)]
    total, _ = dense_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=bias,
        targets=targets,
        terms=terms,
        transform=HeadTransform(),
    )
    wanted, _ = dense_head_loss(
        hidden_ND=hidden,
        weight_VD=parts["weight"],
        bias_V=None,
        targets=targets,
        terms=terms,
        transform=HeadTransform(),
    )
    assert total.item() == wanted.item()
    total.backward()
    assert (weight.grad[40:] == 0).all()
    assert (bias.grad[40:] == 0).all()
    assert (weight.grad[:40] != 0).any()
    with pytest.raises(ValueError, match="39 tokens"):
        dense_head_loss(
            hidden_ND=hidden,
            weight_VD=parts["weight"][:39],
            bias_V=None,
            targets=targets,
            terms=terms,
            transform=HeadTransform(),
        )


def test_a_tied_weight_collects_both_gradients() -> None:
    """The weight enters as embedding and as head; the teacher's own stored weight never gets one."""
    parts = problem(6, 17, 4, 4)
    weight = parts["weight"].requires_grad_()
    targets = targets_of(parts | {"teacher_weight": weight}, torch.float64, HeadTransform())
    terms = [(full.jsd, 1.0)]
    ids = torch.tensor([0, 3, 3, 5, 16, 1])
    total, _ = dense_head_loss(
        hidden_ND=weight[ids],
        weight_VD=weight,
        bias_V=None,
        targets=targets,
        terms=terms,
        transform=HeadTransform(),
    )
    plain = plain_jsd(weight[ids] @ weight.t(), (parts["teacher_hidden"] @ weight.t()).detach(), 0.5)
    (gradient,) = torch.autograd.grad(total, [weight])
    (wanted,) = torch.autograd.grad(plain.sum(), [weight])
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", SMALL)
def test_the_teacher_itself_scores_zero_everywhere(name: str) -> None:
    """And exactly so at logits a thousand apart, where probabilities underflow."""
    parts = problem(5, 33, 4, 4)
    hidden = (parts["teacher_hidden"].float() * 300).requires_grad_()
    weight = parts["teacher_weight"].float()
    targets = DenseTargets(TeacherHead(weight, None, HeadTransform()), hidden.detach())
    total, terms_SN = dense_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=targets,
        terms=[(SMALL[name][0], 1.0)],
        transform=HeadTransform(),
        chunk=2,
    )
    total.backward()
    assert (terms_SN.abs() <= 1e-6).all()
    assert hidden.grad.abs().max() <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_opposite_certainties_stay_finite(name: str) -> None:
    """Teacher and student are certain of different tokens, 400 nats apart."""
    eye = torch.eye(5)
    hidden = torch.tensor([[400.0, 0, 0, 0, 0]], requires_grad=True)
    targets = DenseTargets(TeacherHead(eye, None, HeadTransform()), torch.tensor([[0.0, 400, 0, 0, 0]]))
    total, _ = dense_head_loss(
        hidden_ND=hidden,
        weight_VD=eye,
        bias_V=None,
        targets=targets,
        terms=[(SMALL[name][0], 1.0)],
        transform=HeadTransform(),
    )
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(hidden.grad).all()


def test_no_chunk_holds_more_than_it_may() -> None:
    """The losses see `chunk` rows at a time, and all rows once."""
    parts, seen = problem(23, 19, 3, 5), []

    def spy(rows: full.Rows) -> full.ValueAndGradient:
        seen.append(tuple(rows.student_nV.shape))
        assert rows.student_nV.shape == rows.teacher_nV.shape
        return full.logit_mse(rows)

    targets = targets_of(parts, torch.float64, HeadTransform())
    dense_head_loss(
        hidden_ND=parts["hidden"],
        weight_VD=parts["weight"],
        bias_V=None,
        targets=targets,
        terms=[(spy, 1.0)],
        transform=HeadTransform(),
        chunk=7,
    )
    assert seen == [(7, 19)] * 3 + [(2, 19)]


@pytest.mark.parametrize("name", ["forward", "jsd", "logit mse"])
def test_the_two_products_are_all_that_exists_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them and the head's gradient there are 16 rows of one side at most."""
    n, v, d = 64, 20_000, 8
    monkeypatch.setitem(full_pass.BLOCK_ELEMENTS, "cpu", v)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    parts = problem(n, v, d, d)
    targets = targets_of(parts, torch.float32, HeadTransform())
    inputs = leaves([parts["hidden"], parts["weight"]], torch.float32)

    def loss(_: None) -> None:
        dense_head_loss(*inputs, None, targets, [(LOSSES[name][0], 1.0)], HeadTransform(), chunk=n)

    _, peak = allocated_at_most(lambda: None, loss)
    assert 2 * n * v * 4 <= peak <= (2 * n + d + 16) * v * 4


def test_a_bfloat16_student_and_float32_states() -> None:
    """Without autocast each side is multiplied in its own dtype, and the loss is of float32."""
    parts = problem(9, 31, 4, 6)
    half = leaves([parts["hidden"], parts["weight"]], torch.bfloat16)
    targets = targets_of(parts, torch.float32, HeadTransform())
    _, terms_SN = dense_head_loss(*half, None, targets, [(full.jsd, 1.0)], HeadTransform(), chunk=4)
    goal = targets.hidden_ND @ targets.head.weight_VD.t()
    wanted_N = plain_jsd((half[0] @ half[1].t()).float(), goal, 0.5)
    assert terms_SN.dtype == torch.float32
    torch.testing.assert_close(terms_SN[0], wanted_N.detach())


def test_no_positions_are_no_loss() -> None:
    parts = problem(0, 19, 3, 5)
    hidden = parts["hidden"].requires_grad_()
    targets = targets_of(parts, torch.float64, HeadTransform())
    terms = [(full.jsd, 1.0)]
    total, terms_SN = dense_head_loss(
        hidden_ND=hidden,
        weight_VD=parts["weight"],
        bias_V=None,
        targets=targets,
        terms=terms,
        transform=HeadTransform(),
    )
    total.backward()
    assert total.item() == 0.0
    assert terms_SN.shape == (1, 0)
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_fisher_is_the_expected_squared_gradient(transform: HeadTransform) -> None:
    parts = problem(5, 23, 2, 3)
    targets = targets_of(parts, torch.float64, transform)
    hidden = parts["teacher_hidden"].requires_grad_()
    log_p = head_of(hidden, parts["teacher_weight"], None, transform).log_softmax(-1)
    wanted = torch.zeros_like(hidden)
    for token in range(23):
        (gradient,) = torch.autograd.grad(log_p[:, token].sum(), [hidden], retain_graph=True)
        wanted += log_p[:, token, None].detach().exp() * gradient.square()
    torch.testing.assert_close(fisher_diagonal(targets, chunk=2), wanted)


def test_fisher_of_stored_bfloat16_weights_in_blocks() -> None:
    """Rounding in float32: V terms W^2 in each of two sums, of which the variance is the difference."""
    parts = problem(3, 9_000, 2, 700)
    weight = parts["teacher_weight"].bfloat16()
    low = DenseTargets(TeacherHead(weight, None, HeadTransform()), parts["teacher_hidden"].float())
    exact = DenseTargets(
        TeacherHead(weight.double(), None, HeadTransform()), parts["teacher_hidden"].float().double()
    )
    assert len(low.head.blocks(torch.float32)) > 1
    torch.testing.assert_close(
        low.head.logits(low.hidden_ND).double(),
        exact.hidden_ND @ weight.double().t(),
        rtol=0.0,
        atol=700**0.5 * 2**-24 * 30,
    )
    torch.testing.assert_close(fisher_diagonal(low), fisher_diagonal(exact).float(), rtol=3e-5, atol=1e-6)


def test_fisher_mse_is_half_the_weighted_square() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert fisher_mse(student, teacher, torch.tensor([[3.0, 0.5]])).tolist() == [2.5]
