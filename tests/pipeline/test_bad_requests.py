"""Every bad request: one clear line, exit code 2, before an engine starts, and nothing stored is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import pipeline.generate
from pipeline.cli import main
from tests import teachers


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `distily-cache generate` where starting an engine is an error; gives the one line it prints."""

    def no_engine(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(pipeline.generate, "start_engine", no_engine)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["distily-cache", "generate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        stderr = capfd.readouterr().err
        assert stop.value.code == 2, stderr
        lines = [line for line in stderr.splitlines() if not line.startswith("tokenising")]
        assert len(lines) == 1, stderr
        return lines[0]

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the teacher learns of a student ."}) for _ in range(3)))
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_missing_teacher(refuse: Callable[..., str], corpus: Path, out: Path) -> None:
    assert "no such directory" in refuse("./no/such/teacher", corpus, "--out", out)
    assert not out.exists()


def test_unreachable_hub_teacher(refuse: Callable[..., str], corpus: Path, out: Path) -> None:
    assert "nobody/nothing" in refuse("nobody/nothing", corpus, "--out", out)


def test_not_a_model(refuse: Callable[..., str], corpus: Path, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no config.json" in refuse(folder, corpus, "--out", out)
    (folder / "config.json").write_text("{}")
    assert "TEACHER" in refuse(folder, corpus, "--out", out)
    (folder / "config.json").write_text("not json")
    assert "TEACHER" in refuse(folder, corpus, "--out", out)
    assert "is a file" in refuse(corpus, corpus, "--out", out)


def test_pickled_weights_are_not_loaded(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "safetensors" in refuse(copy, corpus, "--out", out)


def test_missing_dataset(refuse: Callable[..., str], tiny_teacher: Path, out: Path, tmp_path: Path) -> None:
    assert "no such file" in refuse(tiny_teacher, tmp_path / "none.jsonl", "--out", out)
    assert "nobody/none" in refuse(tiny_teacher, "nobody/none", "--out", out)


def test_wrong_column(refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path) -> None:
    line = refuse(tiny_teacher, corpus, "--out", out, "--text-column", "body")
    assert "--text-column body" in line
    assert "text" in line


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', '{"text": "the"}\n'])
def test_empty_data(
    refuse: Callable[..., str], tiny_teacher: Path, out: Path, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    assert "DATASET" in refuse(tiny_teacher, file, "--out", out)


def test_broken_and_binary_data(
    refuse: Callable[..., str], tiny_teacher: Path, out: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "unfinished')
    assert "cannot be loaded" in refuse(tiny_teacher, broken, "--out", out)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refuse(tiny_teacher, binary, "--out", out)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--top-k", "200"], "--top-k 200: larger than the vocabulary of 199"),
        (["--hidden-layers", "4"], "--hidden-layers 4: out of range"),
        (["--hidden-layers", "-1"], "--hidden-layers -1: out of range"),
        (["--hidden-layers", "one"], "--hidden-layers one"),
        (["--relation-layers", "3"], "--relation-layers 3: out of range, the blocks are 0 to 2"),
        (["--relation-layers", "-1"], "--relation-layers -1: out of range"),
        (["--relation-layers", "1,1"], "--relation-layers: the same layer is named twice"),
        (["--relation-layers", "one"], "--relation-layers one"),
        (["--max-seq-len", "257"], "--max-seq-len 257"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--engine", "jax"], "--engine jax"),
        (["--hidden-dtype", "int3"], "--hidden-dtype int3"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--top-k", "0"], "--top-k 0"),
        (["--temperatures", "1"], "--temperatures 1: a temperature is a number from 0.05 to 100"),
        (["--temperatures", "2,0"], "--temperatures 0: a temperature"),
        (["--temperatures", "nan"], "--temperatures nan: a temperature"),
        (["--temperatures", "0.1234"], "--temperatures 0.1234: a temperature"),
        (["--temperatures", "2,2.0"], "--temperatures: the same temperature is named twice"),
        (["--temperatures", "warm"], "--temperatures warm: give numbers"),
    ],
)
def test_bad_options(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, options: list[str], expected: str
) -> None:
    assert expected in refuse(tiny_teacher, corpus, "--out", out, *options)
    assert not out.exists()


def test_unwritable_store(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    assert "not a directory" in refuse(tiny_teacher, corpus, "--out", corpus)
    assert "not writable" in refuse(tiny_teacher, corpus, "--out", corpus / "below")
    assert "--out" in refuse(tiny_teacher, corpus, "--out", "/proc/distily")


def test_a_foreign_directory_is_not_written_into(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    assert "not a feature store" in refuse(tiny_teacher, corpus, "--out", foreign)
    assert [file.name for file in foreign.iterdir()] == ["letter.txt"]


def test_store_of_another_teacher_or_tokenizer(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, tmp_path: Path
) -> None:
    arguments = [
        str(tiny_teacher),
        str(corpus),
        "--out",
        str(out),
        "--engine",
        "transformers",
        "--top-k",
        "4",
    ]
    cli = Path(sys.executable).parent / "distily-cache"
    subprocess.run([str(cli), "generate", *arguments], check=True, capture_output=True, timeout=120)
    before = sorted(str(file) for file in out.rglob("*"))

    other = teachers.llama(tmp_path / "other", seed=1)
    assert "teacher" in refuse(other, corpus, "--out", out, "--engine", "transformers")
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_teacher, renamed)
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["learns"], tokenizer["model"]["vocab"]["a"] = (
        tokenizer["model"]["vocab"]["a"],
        tokenizer["model"]["vocab"]["learns"],
    )
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in refuse(renamed, corpus, "--out", out, "--engine", "transformers")
    assert "engine" in refuse(tiny_teacher, corpus, "--out", out)
    assert sorted(str(file) for file in out.rglob("*")) == before


def test_as_a_process_it_exits_with_2_and_imports_no_vllm(corpus: Path) -> None:
    program = (
        "import atexit, sys; from pipeline.cli import main; "
        "atexit.register(lambda: print('vllm' in sys.modules)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "generate", "./none", str(corpus), "--out", "./none-store"],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (2, "False")
    assert done.stderr == "distily-cache: TEACHER ./none: no such directory\n"
