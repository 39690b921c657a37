"""The fused head against a float64 reference that builds all logits and lets autograd differentiate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from student.losses.lm_head import HeadTransform, chunk_rows, free_bytes
from student.losses.sparse import SparseTargets, cross_entropy, forward_kl
from student.losses.sparse_pass import CHUNK_ELEMENTS, sparse_head_loss

TERMS = [(forward_kl, 0.7), (cross_entropy, 0.3)]


def problem(n: int, v: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, SparseTargets, Tensor]:
    """Random float64 hidden states and weights, targets with ragged heads, and the teacher's full
    log-probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64) * 3 / math.sqrt(d)
    full = (torch.randn(n, v, generator=generator, dtype=torch.float64) * 3).log_softmax(-1)
    logprob, ids = full.topk(k)
    counts = torch.randint(1, k + 1, (n, 1), generator=generator)
    real = torch.arange(k) < counts
    logprob, ids = logprob.masked_fill(~real, -math.inf), torch.where(real, ids, ids[:, :1])
    tail = torch.log1p(-logprob.exp().sum(-1)).masked_fill(counts[:, 0] == v, -math.inf)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::2] = ids[::2, 0]  # labels inside the head as well as outside
    return hidden, weight, SparseTargets(ids_NK=ids, logprob_NK=logprob, tail_N=tail, label_N=labels), full


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: SparseTargets, transform: HeadTransform
) -> Tensor:
    """The same objective, spelled out row by row over the whole vocabulary."""
    raw = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    z = raw * transform.scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_q = z.log_softmax(-1)
    total = z.new_zeros(())
    for row, log_q_V in enumerate(log_q):
        real = torch.isfinite(targets.logprob_NK[row])
        ids, log_p = targets.ids_NK[row][real], targets.logprob_NK[row][real]
        kl = (log_p.exp() * (log_p - log_q_V[ids])).sum()
        outside = torch.ones_like(log_q_V, dtype=torch.bool)
        outside[ids] = False
        if outside.any():
            kl = kl + targets.tail_N[row].exp() * (targets.tail_N[row] - log_q_V[outside].logsumexp(0))
        total = total + 0.7 * kl - 0.3 * log_q_V[targets.label_N[row]]
    return total


def gradients_of(total: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(total, inputs)]


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def lowered(targets: SparseTargets, dtype: torch.dtype) -> SparseTargets:
    return SparseTargets(
        ids_NK=targets.ids_NK,
        logprob_NK=targets.logprob_NK.to(dtype),
        tail_N=targets.tail_N.to(dtype),
        label_N=targets.label_N,
    )


@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(0.0625), HeadTransform(2.0, 5.0)])
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (7, 11, 5, 11), (37, 1003, 33, 9)])
def test_float64_matches_to_rounding(shape: tuple[int, int, int, int], transform: HeadTransform) -> None:
    hidden, weight, targets, _ = problem(*shape)
    inputs = leaves([hidden, weight], torch.float64)
    wanted = reference(*inputs, None, targets, transform)
    got = sparse_head_loss(*inputs, None, targets, TERMS, transform, chunk=max(1, shape[0] // 3)).total
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    for own, right in zip(gradients_of(got, inputs), gradients_of(wanted, inputs), strict=True):
        assert (own - right).norm() <= 1e-12 * right.norm()


@pytest.mark.parametrize("vocabulary", [49_152, 262_144])
@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(1.0, 30.0)])
def test_float32_at_real_vocabularies(vocabulary: int, transform: HeadTransform) -> None:
    """As near to float64 as the plain implementation in float32, up to the order of the sums over V.

    Thin chunks make BLAS add the V terms of dH one by one: V roundings of 2^-24 that walk at random; three
    standard deviations, since how far the walk got depends on the machine's BLAS.
    """
    hidden, weight, targets, _ = problem(5, vocabulary, 17, 64)
    exact = leaves([hidden, weight], torch.float64)
    truth = reference(*exact, None, targets, transform)
    right = gradients_of(truth, exact)
    single = leaves(exact, torch.float32)
    low = lowered(targets, torch.float32)
    plain = gradients_of(reference(*single, None, low, transform), single)
    total = sparse_head_loss(*single, None, low, TERMS, transform, chunk=2).total
    assert total.item() == pytest.approx(truth.item(), rel=1e-6)
    for own, theirs, wanted in zip(gradients_of(total, single), plain, right, strict=True):
        walk = 3 * vocabulary**0.5 * 2**-24
        assert (own - wanted).norm() <= 2 * (theirs - wanted).norm() + walk * wanted.norm()


def test_gradients_are_finite_differences_with_bias_scale_and_softcap() -> None:
    hidden, weight, targets, _ = problem(4, 9, 3, 4)
    inputs = leaves([hidden, weight, torch.randn(9)], torch.float64)

    def total(*tensors: Tensor) -> Tensor:
        return sparse_head_loss(*tensors, targets, TERMS, HeadTransform(0.5, 4.0), chunk=3).total

    step = 1e-6
    for index, gradient in enumerate(gradients_of(total(*inputs), inputs)):
        for place in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [tensor.detach().clone() for tensor in inputs]
                moved[index].view(-1)[place] += sign * step
                values.append(total(*moved).item())
            slope = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[place].item() == pytest.approx(slope, abs=1e-7)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets, _ = problem(3, 9, 2, 2)
    inputs = leaves([hidden, weight], torch.float64)
    total = sparse_head_loss(*inputs, None, targets, TERMS, HeadTransform()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_bfloat16_is_as_good_as_a_plain_bfloat16_head() -> None:
    """Under autocast the gradient is no worse than that of bfloat16 logits with the loss in float32."""
    hidden, weight, targets, _ = problem(64, 1003, 128, 16)
    inputs = leaves([hidden, weight], torch.float64)
    right = gradients_of(reference(*inputs, None, targets, HeadTransform()), inputs)
    low, single, half = (
        lowered(targets, torch.float32),
        leaves(inputs, torch.float32),
        leaves(inputs, torch.bfloat16),
    )
    with torch.autocast("cpu", torch.bfloat16):
        fused = sparse_head_loss(*single, None, low, TERMS, HeadTransform(), chunk=20).total
    logits = (half[0] @ half[1].t()).float()
    plain = reference(logits, torch.eye(1003), None, low, HeadTransform())
    for own, theirs, truth in zip(gradients_of(fused, single), gradients_of(plain, half), right, strict=True):
        assert (own - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, targets, _ = problem(6, 50, 4, 5)
    hidden.requires_grad_()
    sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=targets,
        terms=TERMS,
        transform=HeadTransform(),
    ).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_coarse_kl_is_a_lower_bound_and_zero_for_the_teacher_itself() -> None:
    hidden, weight, targets, full = problem(40, 300, 16, 12)
    log_q = (hidden @ weight.t()).log_softmax(-1)
    exact = (full.exp() * (full - log_q)).sum(-1)
    coarse = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=targets,
        terms=[(forward_kl, 1.0)],
        transform=HeadTransform(),
    ).terms_SN[0]
    assert (coarse <= exact + 1e-12).all()
    assert (coarse > 0).all()
    itself = sparse_head_loss(
        hidden_ND=full,
        weight_VD=torch.eye(300).double(),
        bias_V=None,
        targets=targets,
        terms=[(forward_kl, 1.0)],
        transform=HeadTransform(),
    )
    assert itself.terms_SN.abs().max() < 1e-12


def test_a_head_that_holds_all_the_mass_is_finite() -> None:
    """The teacher is certain, and the student nearly so: tails of mass 1e-30 neither overflow nor
    vanish into NaN.
    """
    ids = torch.tensor([[0, 1]])
    targets = SparseTargets(
        ids_NK=ids,
        logprob_NK=torch.tensor([[0.0, -40.0]]),
        tail_N=torch.tensor([-math.inf]),
        label_N=torch.tensor([0]),
    )
    hidden = torch.tensor([[80.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.5], [0.1], [0.0]], requires_grad=True)
    result = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=targets,
        terms=TERMS,
        transform=HeadTransform(),
    )
    result.total.backward()
    assert torch.isfinite(result.terms_SN).all()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_agreement_looks_at_the_whole_vocabulary() -> None:
    ids = torch.tensor([[2, 0], [2, 0], [2, 0]])
    logprob, tail = torch.tensor([[0.6, 0.3]] * 3).log(), torch.full((3,), math.log(0.1))
    logits = torch.tensor([[1.0, 0.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0], [1.0, 0.0, 2.0, 9.0]])
    targets = SparseTargets(ids_NK=ids, logprob_NK=logprob, tail_N=tail, label_N=torch.tensor([0, 0, 0]))
    result = sparse_head_loss(
        hidden_ND=logits,
        weight_VD=torch.eye(4),
        bias_V=None,
        targets=targets,
        terms=TERMS,
        transform=HeadTransform(),
        chunk=2,
    )
    assert result.agree_N.tolist() == [True, False, False]


def test_no_head_columns_leave_plain_cross_entropy() -> None:
    hidden, weight, targets, _ = problem(9, 31, 4, 3)
    bare = SparseTargets(
        ids_NK=targets.ids_NK[:, :0],
        logprob_NK=targets.logprob_NK[:, :0],
        tail_N=torch.zeros(9).double(),
        label_N=targets.label_N,
    )
    got = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=bare,
        terms=[(cross_entropy, 1.0)],
        transform=HeadTransform(),
    ).total
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets.label_N, reduction="sum")
    torch.testing.assert_close(got, wanted)


GIB = 2**30
SMALL, LARGE = (49_152, 576), (128_256, 2048)


def test_chunks_on_cpus_are_what_they_were() -> None:
    """2^25 logits at a time, shared by the temperatures."""
    assert free_bytes(torch.device("cpu")) == 0
    for shape, temperatures in itertools.product((SMALL, LARGE, (2**26, 8)), (1, 3)):
        rows = chunk_rows(shape, 4, CHUNK_ELEMENTS // temperatures, temperatures + 1, free=0)
        assert rows == max(1, 2**25 // (shape[0] * temperatures))


def test_chunks_grow_with_free_memory_and_fit_into_it() -> None:
    rows = [chunk_rows(LARGE, 2, CHUNK_ELEMENTS, 2, free * GIB) for free in (0, 2, 8, 24, 80)]
    assert rows == [261, 261, 1024, 2048, 2048]
    for free, (v, d) in itertools.product((4, 8, 16, 24, 80), (SMALL, LARGE)):
        for itemsize, buffers in ((2, 2), (4, 3), (2, 10)):
            found = chunk_rows((v, d), itemsize, CHUNK_ELEMENTS, buffers, free * GIB)
            least = CHUNK_ELEMENTS // v
            assert least <= found <= max(least, 2048)
            taken = v * d * (4 + itemsize) + found * v * (itemsize + 4 * buffers)
            assert found == least or taken <= free * GIB
