"""Relations and attention against plain float64 formulas over whole T x T matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from student.losses import relations
from student.losses.relations import Scoring, Vectors, attention_output, relation_heads, relation_kl


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(length: int, window: int | None, documents_T: Tensor | None) -> Tensor:
    """Pair by pair: may row t see column s."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        for s in range(t + 1):
            near = window is None or t - s < window
            mask[t, s] = near and (documents_T is None or bool(documents_T[t] == documents_T[s]))
    return mask


def plain_row_kl(
    student: Vectors, teacher: Vectors, window: int | None = None, documents_BT: Tensor | None = None
) -> Tensor:
    """[B, T], every relation matrix built as a whole."""
    batch, heads, length, _ = student.rows.shape
    values = []
    for b in range(batch):
        mask = seen(length, window, None if documents_BT is None else documents_BT[b])
        total = torch.zeros(length, dtype=torch.float64)
        for a in range(heads):
            log_p, log_q = (log_probabilities(side, b, a, mask) for side in (teacher, student))
            total = total + (log_p.exp() * (log_p - log_q).masked_fill(~mask, 0.0)).sum(-1)
        values.append(total / heads)
    return torch.stack(values)


def log_probabilities(side: Vectors, b: int, a: int, mask: Tensor) -> Tensor:
    z = side.rows[b, a] @ side.columns[b, a].t() * side.scoring.scale
    if side.scoring.softcap:
        z = side.scoring.softcap * torch.tanh(z / side.scoring.softcap)
    return z.masked_fill(~mask, -math.inf).log_softmax(-1)


def sides(
    batch: int, heads: int, length: int, student_d: int, teacher_d: int, scoring: Scoring
) -> tuple[Vectors, Vectors]:
    student = [randn(batch, heads, length, student_d, seed=s).requires_grad_() for s in (1, 2)]
    teacher = [randn(batch, heads, length, teacher_d, seed=s) for s in (3, 4)]
    return Vectors(*student, scoring), Vectors(*teacher, Scoring(0.4, 3.0))


SCORINGS = [Scoring(0.7), Scoring(1.3, 2.0)]
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 4, 5), (1, 2, 13, 3, 2)]


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_whole_matrices(
    shape: tuple[int, int, int, int, int], scoring: Scoring, window: int | None, chunk: int
) -> None:
    student, teacher = sides(*shape, scoring)
    documents = torch.arange(shape[2]).expand(shape[0], -1) // 5
    row_weights = randn(shape[0], shape[2], seed=5)  # every row with a gradient of its own
    got = relation_kl(student, teacher, window, documents, chunk)
    wanted = plain_row_kl(student, teacher, window, documents)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    inputs = [student.rows, student.columns]
    gradients = torch.autograd.grad((got * row_weights).sum(), inputs)
    right = torch.autograd.grad((wanted * row_weights).sum(), inputs)
    for own, truth in zip(gradients, right, strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradients_are_finite_differences(scoring: Scoring) -> None:
    _, teacher = sides(2, 2, 5, 3, 4, scoring)

    def values(rows: Tensor, columns: Tensor) -> Tensor:
        return relation_kl(Vectors(rows, columns, scoring), teacher, chunk=2)

    inputs = [randn(2, 2, 5, 3, seed=s).requires_grad_() for s in (6, 7)]
    assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_other_head_counts_and_widths_by_relation_heads(heads: int) -> None:
    """A student of 3 heads of 4 and a teacher of 2 heads of 9: widths 12 and 18 split alike."""
    x_s, x_t = randn(2, 9, 3, 4).requires_grad_(), randn(2, 9, 2, 9, seed=1)
    got = relation_kl(Vectors.among_themselves(x_s, heads), Vectors.among_themselves(x_t, heads), chunk=4)
    total = torch.zeros(2, 9, dtype=torch.float64)
    for a in range(heads):
        logs = []
        for x in (x_t, x_s):
            flat = x.flatten(2)
            d = flat.shape[-1] // heads
            part = flat[..., a * d : (a + 1) * d]
            z = part @ part.mT / math.sqrt(d)
            logs.append(z.masked_fill(~seen(9, None, None), -math.inf).log_softmax(-1))
        gap = (logs[0] - logs[1]).masked_fill(~seen(9, None, None), 0.0)
        total = total + (logs[0].exp() * gap).sum(-1) / heads
    torch.testing.assert_close(got, total)
    (own,), (right,) = (torch.autograd.grad(v.square().sum(), [x_s]) for v in (got, total))
    torch.testing.assert_close(own, right)


def test_uneven_splits_and_unlike_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="12 numbers cannot be split into 5"):
        relation_heads(randn(1, 2, 3, 4), 5)
    student, _ = sides(1, 2, 5, 3, 3, SCORINGS[0])
    _, teacher = sides(1, 3, 5, 3, 3, SCORINGS[0])
    with pytest.raises(ValueError, match="cannot be compared"):
        relation_kl(student, teacher)


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    student, teacher = sides(1, 2, 11, 3, 4, SCORINGS[0])
    whole = relation_kl(student, teacher)
    cut = relation_kl(
        Vectors(student.rows[:, :, :7], student.columns[:, :, :7], student.scoring),
        Vectors(teacher.rows[:, :, :7], teacher.columns[:, :, :7], teacher.scoring),
    )
    torch.testing.assert_close(whole[:, :7], cut)
    d_rows, d_columns = torch.autograd.grad(whole[:, :7].sum(), [student.rows, student.columns])
    assert (d_rows[:, :, 7:] == 0).all()
    assert (d_columns[:, :, 7:] == 0).all()


def test_the_teacher_itself_has_no_loss_and_no_gradient() -> None:
    x = randn(2, 6, 2, 4).requires_grad_()
    value = relation_kl(Vectors.among_themselves(x, 4), Vectors.among_themselves(x.detach(), 4))
    value.sum().backward()
    assert value.abs().max() == 0.0
    assert x.grad.abs().max() <= 1e-15


def test_no_more_scores_than_a_chunk_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that is computed, forward and backward, holds at most CHUNK_ELEMENTS scores."""
    monkeypatch.setattr(relations, "CHUNK_ELEMENTS", 400)
    sizes, real = [], relations._distributions

    def measured(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        parts = real(*arguments)
        sizes.append(max(part.numel() for part in parts))
        return parts

    monkeypatch.setattr(relations, "_distributions", measured)
    student, teacher = sides(2, 4, 31, 3, 4, SCORINGS[0])
    relation_kl(student, teacher).sum().backward()
    assert max(sizes) <= 400 < 4 * 31 * 31
    assert len(sizes) == 2 * 2 * math.ceil(31 / 3)


def test_bfloat16_is_as_good_as_plain_bfloat16_products() -> None:
    student, teacher = sides(2, 4, 33, 16, 16, Scoring(0.25))
    right_N = plain_row_kl(student, teacher)
    right = torch.autograd.grad(right_N.sum(), [student.rows, student.columns])
    halves = [x.detach().bfloat16().requires_grad_() for x in (student.rows, student.columns)]
    mask = seen(33, None, None)
    z_s = (halves[0] @ halves[1].mT).float() * 0.25
    z_t = (teacher.rows.bfloat16() @ teacher.columns.bfloat16().mT).float() * 0.4
    z_t = 3.0 * torch.tanh(z_t / 3.0)
    log_p, log_q = (z.masked_fill(~mask, -1e30).log_softmax(-1) for z in (z_t, z_s))
    plain = (log_p.exp() * (log_p - log_q).masked_fill(~mask, 0.0)).sum(-1).mean(1)
    theirs = torch.autograd.grad(plain.sum(), halves)
    single = [x.detach().float().requires_grad_() for x in (student.rows, student.columns)]
    with torch.autocast("cpu", torch.bfloat16):
        low_teacher = Vectors(teacher.rows.float(), teacher.columns.float(), teacher.scoring)
        value = relation_kl(Vectors(single[0], single[1], student.scoring), low_teacher)
    assert value.dtype == torch.float32
    for own, rough, truth in zip(torch.autograd.grad(value.sum(), single), theirs, right, strict=True):
        assert (own - truth).norm() <= 1.1 * (rough.double() - truth).norm()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_output_is_the_weighted_mean_of_values(heads: tuple[int, int], window: int | None) -> None:
    h, g = heads
    q, k, v = randn(2, 7, h, 3), randn(2, 7, g, 3, seed=1), randn(2, 7, g, 3, seed=2)
    got = attention_output(q, k, v, 0.8, window)
    mask = seen(7, window, None)
    for head in range(h):
        source = head // (h // g)
        z = 0.8 * q[:, :, head] @ k[:, :, source].mT
        wanted = z.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, :, source]
        torch.testing.assert_close(got[..., 3 * head : 3 * head + 3], wanted)
