"""A student or an evaluated model whose checkpoint is not whole is refused; nothing random is completed."""

from __future__ import annotations

from pathlib import Path

import pytest

from student.errors import UserError
from student.evaluation.models import teacher_side
from student.generation import load
from tests import checkpoints, teachers
from tests.checkpoints import UNTIED, copy_of


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachers.qwen3(tmp_path_factory.mktemp("untied") / "student", vocab_size=199)


@pytest.mark.parametrize("name", UNTIED)
def test_a_damaged_student_does_not_load(untied: Path, tmp_path: Path, name: str) -> None:
    damage, words = UNTIED[name]
    directory = copy_of(untied, tmp_path / "damaged")
    damage(directory)
    with pytest.raises(UserError) as refused:
        load(directory)
    for word in words:
        assert word in str(refused.value)


def test_a_damaged_teacher_is_not_evaluated(untied: Path, tmp_path: Path) -> None:
    directory = copy_of(untied, tmp_path / "damaged")
    checkpoints.without("lm_head.weight")(directory)
    with pytest.raises(UserError, match=r"--teacher .*lm_head\.weight"):
        teacher_side(str(directory), "float32").load()
