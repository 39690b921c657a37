"""A student or an evaluated model whose checkpoint is not whole is refused; nothing random is completed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.reader import CacheReader
from student.config.flags import StudentOptions
from student.errors import UserError
from student.evaluation.models import teacher_side
from student.export.generation import load
from student.modeling.plan import plan_student
from tests import checkpoints, teachers
from tests.checkpoints import UNTIED, copy_of
from tests.student.exports import save


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


@pytest.mark.parametrize("conversion", ["none", "subln", "per-projection"])
@pytest.mark.parametrize("lost", ["mlp.down_proj.weight", "a norm"])
def test_a_converted_student_is_whole_before_it_is_built(
    cache: Path, tmp_path: Path, conversion: str, lost: str
) -> None:
    directory = save(tmp_path / "student", "llama", conversion=conversion)
    names = {
        "none": "input_layernorm.weight",
        "subln": "mlp.ffn_sub_norm.weight",
        "per-projection": "mlp.down_proj.rms_norm.weight",
    }
    name = "model.layers.1." + (names[conversion] if lost == "a norm" else lost)
    reader, options = CacheReader.open(cache), StudentOptions(student=str(directory))
    assert plan_student(options, reader).converted
    checkpoints.without(name)(directory)
    with pytest.raises(UserError, match=rf"--student .* lacks {name}"):
        plan_student(options, reader)


def test_training_refuses_it_with_one_line(cache: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    directory, out = save(tmp_path / "student", "llama"), tmp_path / "out"
    checkpoints.without("model.norm.weight")(directory)
    line = refused("from-cache", cache, "--student", directory, "--output-dir", out, "--max-steps", 1)
    assert "lacks model.norm.weight" in line
    assert not out.exists()
