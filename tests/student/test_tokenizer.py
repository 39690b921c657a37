"""A student's tokenizer is its teacher's: the same ids for whoever loads it, from all of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from student.evaluation.models import student_side, teacher_side
from student.export.generation import student_tokenizer
from tests import teachers
from tests.command import generate
from tests.tokenizers import TEXT, byte_level, file_ids, word_piece

Run = Callable[..., tuple[int, str, str]]
ONE_STEP = ("--eval-fraction", 0, "--max-steps", 1, "--report-to", "none", "--json")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *teachers.WORDS]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teachers.llama(tmp_path / "teacher", vocab_size=330)


@pytest.fixture
def train(distily: Run, tmp_path: Path) -> Callable[[Path, str], Path]:
    """A cache of a text by a teacher, and a student of one step on it."""

    def run(teacher: Path, text: str) -> Path:
        (tmp_path / "text.txt").write_text(text)
        generate(teacher, tmp_path / "text.txt", tmp_path / "store", "--top-k", 4, "--max-seq-len", 200)
        out = tmp_path / "student"
        code, _, err = distily("from-cache", tmp_path / "store", "--output-dir", out, *ONE_STEP)
        assert code == 0, err
        return out

    return run


def test_everyone_gets_the_ids_of_the_teachers_file(
    teacher: Path, train: Callable[[Path, str], Path]
) -> None:
    """The label LlamaTokenizerFast on a byte-level BPE loses all spaces."""
    byte_level(teacher, "LlamaTokenizerFast", legacy=True)
    student = train(teacher, TEXT)
    expected = file_ids(teacher, TEXT)
    assert AutoTokenizer.from_pretrained(student)(TEXT).input_ids == expected
    assert AutoTokenizer.from_pretrained(student).eos_token == "</s>"
    assert student_tokenizer(student)(TEXT).input_ids == expected
    assert student_side(student).tokenizer(TEXT).input_ids == expected
    assert teacher_side(str(teacher), "float32").tokenizer(TEXT).input_ids == expected
    # A student that was saved with the wrong label is read right.
    shutil.copy(teacher / "tokenizer_config.json", student)
    assert student_tokenizer(student)(TEXT).input_ids == expected


def test_a_label_that_is_right_stays(teacher: Path, train: Callable[[Path, str], Path]) -> None:
    byte_level(teacher)
    student = train(teacher, TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (student / name).read_bytes() == (teacher / name).read_bytes()


def test_a_vocabulary_in_vocab_txt_goes_along(
    teacher: Path, train: Callable[[Path, str], Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    word_piece(teacher, WORDS)
    student = train(teacher, "the teacher learns and the student learns")
    ids = AutoTokenizer.from_pretrained(student)("the student").input_ids
    assert ids == AutoTokenizer.from_pretrained(teacher)("the student").input_ids
    assert 1 not in ids  # [UNK]
    other = tmp_path / "other"
    shutil.copytree(student, other)
    word_piece(other, [*WORDS[:5], *reversed(WORDS[5:])])
    flags = ["--output-dir", tmp_path / "o", "--eval-fraction", 0, "--pack-rows"]
    line = refused("from-cache", tmp_path / "store", "--student", other, *flags)
    assert "the student's tokenizer is not the teacher's" in line


def test_named_chat_templates_go_along(teacher: Path, train: Callable[[Path, str], Path]) -> None:
    byte_level(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(teacher)
    assert AutoTokenizer.from_pretrained(train(teacher, TEXT)).chat_template == templates


def test_an_export_has_the_ids_too(teacher: Path, distily: Run, tmp_path: Path) -> None:
    byte_level(teacher, "LlamaTokenizerFast")
    (tmp_path / "text.txt").write_text(TEXT)
    generate(teacher, tmp_path / "text.txt", tmp_path / "store", "--top-k", 4, "--max-seq-len", 200)
    flags = ("--student-model-as-bitnet", *ONE_STEP)
    out = tmp_path / "student"
    assert distily("from-cache", tmp_path / "store", "--output-dir", out, *flags)[0] == 0
    code, _, err = distily("export", out, "--format", "hf-bitnet", "--out", tmp_path / "hf")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXT).input_ids == file_ids(teacher, TEXT)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 330
