"""Every token at which the teacher stops ends the student's texts too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from student.modeling.saving import new_student, save_student, stop_tokens
from tests import teachers
from tests.student.exports import Export, save
from tests.student.test_export_gguf import SHAPE, byte_level


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


def test_generate_ends_at_the_second_of_them(
    distily: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    directory = save(tmp_path / "student", "llama")
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]

    def written() -> tuple[int, list[str]]:
        flags = ("--prompt", "the teacher", "--no-chat", "--max-new-tokens", 6, "--json")
        code, out, err = distily("generate", directory, *flags)
        assert code == 0, err
        result = json.loads(out)
        return result["new_tokens"], result["text"].split()

    count, words = written()
    assert count == 6
    stop = words[2]
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text())
    assert settings["eos_token_id"] == 2
    path.write_text(json.dumps(settings | {"eos_token_id": [2, vocabulary[stop]]}))
    assert written() == (words.index(stop) + 1, words[: words.index(stop) + 1])


def named_in_gguf(export: Export, student: Path) -> dict[str, int]:
    """eos, eot, eom of the exported file, as gguf's own reader finds them."""
    fields = gguf.GGUFReader(next(Path(export(student, "gguf")["out"]).glob("*.gguf"))).fields
    names = {kind: f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")}
    return {kind: int(fields[name].contents()) for kind, name in names.items() if name in fields}


@pytest.fixture
def byte_student(tmp_path: Path) -> Path:
    """A student with a byte-level tokenizer whose eos is 2, as its config says."""
    directory = save(tmp_path / "student", "llama", **SHAPE, vocab_size=300)
    byte_level(300).save_pretrained(directory)
    return directory


def stop_at(directory: Path, *ends: int) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def test_a_gguf_file_names_three(byte_student: Path, export: Export) -> None:
    assert named_in_gguf(export, byte_student) == {"eos": 2}
    stop_at(byte_student, 0, 2)
    assert named_in_gguf(export, byte_student) == {"eos": 2, "eot": 0}
    stop_at(byte_student, 0, 1, 2)
    assert named_in_gguf(export, byte_student) == {"eos": 2, "eot": 0, "eom": 1}


def test_a_fourth_is_not_left_out_silently(byte_student: Path, refused: Callable[..., str]) -> None:
    stop_at(byte_student, 0, 1, 2, 40)
    line = refused("export", byte_student, "--format", "gguf")
    assert "4 tokens (0, 1, 2, 40)" in line
    assert "generation_config.json" in line


def test_without_an_end_token_of_the_tokenizer(byte_student: Path, export: Export) -> None:
    path = byte_student / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    stop_at(byte_student, 2, 7)
    assert named_in_gguf(export, byte_student) == {"eos": 2, "eot": 7}
