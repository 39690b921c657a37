"""Every token at which the teacher stops ends the student's texts too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student.saving import new_student, save_student, stop_tokens
from tests import teachers


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """eos 2 by its config and tokenizer, [2, 17] by its generation config."""
    directory = teachers.llama(tmp_path / "teacher")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    return directory


def test_the_union_is_saved_with_the_student(teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    student = new_student(AutoConfig.from_pretrained(teacher))
    save_student(student, tmp_path / "student", teacher)
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [2, 17]
    assert stop_tokens(tmp_path / "student") == [2, 17]


def test_the_tokenizers_end_counts(teacher: Path) -> None:
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "learns"}))
    ids = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    assert stop_tokens(teacher) == sorted({2, 17, ids["learns"]})
