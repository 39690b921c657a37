"""Files of a checkpoint, a student or a store's teacher made to harm: one line, and no code runs."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distily.checkpoint.configs import json_object
from distily.errors import CheckpointError, DistilyError
from student.errors import UserError, exit_code
from student.modeling.checkpoint import INDEX, CheckpointTensors
from student.modeling.plan import load_config
from student.modeling.saving import stop_tokens
from student.modeling.tokenizer import load_tokenizer
from student.report.files import read_run
from student.training.summary import teacher_config

DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("data", [DEEP, b"[" * 100_000, b"[1]", b"3", b"{", b"\xff\xfe", b"", b"9" * 5000])
def test_json_that_is_no_object_of_a_checkpoint(tmp_path: Path, data: bytes) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name) as caught:
            json_object(tmp_path / name)
        assert "\n" not in str(caught.value) and exit_code(caught.value) == 2
    for read in (stop_tokens, teacher_config):
        with pytest.raises(CheckpointError):
            read(tmp_path)
    (tmp_path / "summary.json").write_bytes(data)
    with pytest.raises(UserError):
        read_run(tmp_path)


@pytest.mark.parametrize("value", [None, 3, "x", [], [[1]], {}, {"a": 1}, True, 1.5, [{"id": "x"}, 3, None]])
def test_values_of_another_kind(tmp_path: Path, value: Any) -> None:
    names = ("text_config", "eos_token_id", "eos_token", "model", "added_tokens", "num_attention_heads")
    for name in FILES:
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(names, value)))
    assert all(type(token) is int for token in stop_tokens(tmp_path))
    assert all(isinstance(size, int) for size in teacher_config(tmp_path).values())


@pytest.mark.parametrize("read", [lambda path: load_config(str(path), "the teacher"), load_tokenizer])
def test_code_of_a_checkpoint_does_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    """transformers asks on the terminal by itself, and takes what is typed there for an answer."""

    def asked(*_: object) -> NoReturn:
        raise AssertionError("transformers asked whether to run code")

    monkeypatch.setattr(builtins, "input", asked)
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    code = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Config", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-its-own", "auto_map": code}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": code, "tokenizer_class": "Own"}))
    with pytest.raises((DistilyError, ValueError)):
        read(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_an_index_that_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="names no safetensors files beside it"):
        CheckpointTensors(tmp_path)
