"""Projectors: shapes, orthogonality, and what is written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student.errors import StudentError, UserError
from student.objective.projectors import IDENTITY, PROJECTORS, Projectors, ProjectorSpec

LEARNED = [kind for kind in PROJECTORS if kind != IDENTITY]
WIDTHS = [(8, 8), (5, 12), (12, 5)]


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize(("own", "theirs"), WIDTHS)
def test_a_projector_has_the_teachers_width(kind: str, own: int, theirs: int) -> None:
    module = ProjectorSpec(kind, own, theirs).build()
    assert module(torch.randn(2, 3, own)).shape == (2, 3, theirs)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("own", "theirs"), WIDTHS)
def test_an_orthogonal_projector_stays_orthogonal(own: int, theirs: int) -> None:
    torch.manual_seed(0)
    module = ProjectorSpec("orthogonal", own, theirs).build()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()  # type: ignore[union-attr, operator]
    for _ in range(5):
        optimizer.zero_grad()
        (module(torch.randn(16, own)) - torch.randn(16, theirs)).square().mean().backward()
        optimizer.step()
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    assert (weight - before).norm() > 1e-2
    gram = weight.T @ weight if own <= theirs else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(own, theirs)), rtol=0, atol=1e-5)


def test_a_linear_projector_begins_without_changing_lengths() -> None:
    states = torch.randn(4, 5)
    projected = ProjectorSpec("linear", 5, 12).build()(states)
    torch.testing.assert_close(projected.norm(dim=-1), states.norm(dim=-1))


SPECS = {
    "one": ProjectorSpec("orthogonal", 5, 12),
    "two": ProjectorSpec("mlp", 5, 12),
    "three": ProjectorSpec("linear", 5, 5),
}


def test_saved_projectors_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, fresh = Projectors(SPECS), Projectors(SPECS)
    saved.save(tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), fresh.parameters(), strict=True))
    fresh.load(tmp_path)
    states = torch.randn(3, 5)
    for name in SPECS:
        assert torch.equal(saved[name](states), fresh[name](states))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


def test_nothing_is_written_or_asked_for_where_there_are_none(tmp_path: Path) -> None:
    Projectors({}).save(tmp_path)
    Projectors({}).load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_projectors_of_another_objective_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no projectors, the objective asks for .*orthogonal"):
        Projectors(SPECS).load(tmp_path)
    Projectors(SPECS).save(tmp_path)
    with pytest.raises(UserError, match="asks for no projectors"):
        Projectors({}).load(tmp_path)
    with pytest.raises(UserError, match="--resume-from-checkpoint"):
        Projectors({**SPECS, "two": ProjectorSpec("linear", 5, 12)}).load(tmp_path)


@pytest.mark.parametrize("file", ["projectors.safetensors", "projectors.json"])
def test_damaged_projectors_are_a_failure(file: str, tmp_path: Path) -> None:
    Projectors(SPECS).save(tmp_path)
    (tmp_path / file).write_bytes(b"\xff" * 20)
    with pytest.raises(StudentError, match="cannot be read"):
        Projectors(SPECS).load(tmp_path)
