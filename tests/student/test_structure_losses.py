"""Relations between positions and between layers, against loops over pairs and triples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from student.losses import structure

Loss = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
LENGTHS = (7, 1, 2, 12, 3)
PAIRWISE: list[Loss] = [structure.similarity, structure.distance, structure.angle]


def states(width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), width, generator=generator, dtype=dtype)


def huber(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size * size if size < 1 else size - 0.5


def plain_similarity(s: list[Tensor], t: list[Tensor]) -> list[float]:
    def row(x: list[Tensor], i: int) -> list[float]:
        products = [float(x[i] @ other) for other in x]
        norm = math.sqrt(sum(p * p for p in products))
        return [p / norm for p in products]

    n = len(s)
    return [sum((a - b) ** 2 for a, b in zip(row(s, i), row(t, i), strict=True)) / n for i in range(n)]


def plain_distance(s: list[Tensor], t: list[Tensor]) -> list[float]:
    n = len(s)
    if n == 1:
        return [0.0]

    def relative(x: list[Tensor]) -> dict[tuple[int, int], float]:
        d = {(i, j): float((x[i] - x[j]).norm()) for i in range(n) for j in range(n) if i != j}
        return {pair: value / (sum(d.values()) / len(d)) for pair, value in d.items()}

    d_s, d_t = relative(s), relative(t)
    return [sum(huber(d_s[i, j] - d_t[i, j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]


def plain_angle(s: list[Tensor], t: list[Tensor]) -> list[float]:
    n = len(s)

    def cosine(x: list[Tensor], i: int, j: int, k: int) -> float:
        one, other = x[j] - x[i], x[k] - x[i]
        return float(one @ other / (one.norm() * other.norm()))

    values = []
    for i in range(n):
        triples = [(i, (i + a) % n, (i + b) % n) for a, b in structure._offsets(n)]
        values.append(
            sum(huber(cosine(s, *three) - cosine(t, *three)) for three in triples) / structure.TRIPLES
        )
    return values


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (structure.similarity, plain_similarity),
        (structure.distance, plain_distance),
        (structure.angle, plain_angle),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 2**22])
def test_values_are_those_of_plain_loops(
    loss: Loss, plain: Callable[..., list[float]], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other widths on both sides, and whatever the number of rows in a chunk."""
    monkeypatch.setattr(structure, "ROW_ELEMENTS", rows * max(LENGTHS))
    student, teacher = 3.0 * states(5, 0), states(9, 1)
    wanted = [
        value
        for s, t in zip(student.split(LENGTHS), teacher.split(LENGTHS), strict=True)
        for value in plain(list(s), list(t))
    ]
    got = loss(student, teacher, LENGTHS)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert (got > 0).any()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_gradients_through_chunks(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "ROW_ELEMENTS", 3 * max(LENGTHS))
    student, teacher = states(4, 2).requires_grad_(), states(6, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, LENGTHS), (student,))


@pytest.mark.parametrize("loss", PAIRWISE)
def test_zero_when_only_scale_and_rotation_differ(loss: Loss) -> None:
    teacher = states(6, 4)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    turned = (2.5 * teacher @ rotation).requires_grad_()
    values = loss(turned, teacher, LENGTHS)
    assert values.abs().max() < 1e-12
    values.sum().backward()
    assert turned.grad is not None and turned.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_equal_positions_have_finite_gradients(loss: Loss) -> None:
    student = torch.zeros(sum(LENGTHS), 4, dtype=torch.float64, requires_grad=True)
    loss(student, states(6, 5), LENGTHS).sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_a_sequence_is_worth_the_same_in_any_company(loss: Loss) -> None:
    student, teacher = states(5, 6), states(7, 7)
    together = loss(student, teacher, LENGTHS)
    alone = [
        loss(s, t, [len(s)]) for s, t in zip(student.split(LENGTHS), teacher.split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)
    assert loss(student[:0], teacher[:0], []).shape == (0,)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_float32_under_autocast(loss: Loss) -> None:
    student, teacher = states(64, 8, torch.float32), states(48, 9, torch.float32)
    exact = loss(student.double(), teacher.double(), LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(student, teacher, LENGTHS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


def test_triples_are_of_three_positions() -> None:
    for length in range(3, 200):
        pairs = structure._offsets(length)
        assert len(pairs) == structure.TRIPLES
        assert all(0 < a < length and 0 < b < length and a != b for a, b in pairs)
    assert structure._offsets(2) == structure._offsets(1) == []


def test_fsp_is_the_difference_of_gram_matrices_between_layers() -> None:
    student, teacher = (states(4, 10), states(6, 11)), (states(4, 12), states(6, 13))
    got = structure.fsp(student, teacher, LENGTHS)
    wanted, start = [], 0
    for length in LENGTHS:
        rows = range(start, start + length)
        start += length
        total = 0.0
        for i in range(4):
            for j in range(6):
                flows = [sum(float(a[r, i] * b[r, j]) for r in rows) / length for a, b in (student, teacher)]
                total += (flows[0] - flows[1]) ** 2
        wanted += [total / 24] * length
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    leaves = tuple(x.requires_grad_() for x in student)
    assert torch.autograd.gradcheck(lambda a, b: structure.fsp((a, b), teacher, LENGTHS), leaves)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_no_square_matrix_is_kept_for_the_backward_pass(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph holds grows with the length, not with its square."""
    monkeypatch.setattr(structure, "ROW_ELEMENTS", 1024)

    def held(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        student = torch.randn(length, 3, requires_grad=True)
        teacher = torch.randn(length, 3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(student, teacher, [length]).sum()
        return sum(sizes.values())

    assert held(512) < 3 * held(256) + 4096
