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
import torch

import pipeline.generate.passes
import pipeline.generate.run
from featurestore.storage.files import TEMPORARY
from pipeline.cli import main
from pipeline.request.target import check_store_directory
from tests import teachers
from tests.command import call, generate


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `distily-cache generate` where starting an engine is an error; gives the one line it prints."""

    def no_engine(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(pipeline.generate.passes, "start_engine", no_engine)
    monkeypatch.setattr(pipeline.generate.run, "start_writer", no_engine)

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


def chats_of(file: Path, *rows: object) -> Path:
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return file


def test_bad_chats(refuse: Callable[..., str], tiny_teacher: Path, out: Path, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "a token"}, {"role": "assistant", "content": "the cache"}]
    chats = chats_of(tmp_path / "chats.jsonl", good)
    template = tmp_path / "chat.jinja"
    assert "--chat-template: the teacher's tokenizer has no chat template" in refuse(
        tiny_teacher, chats, "--out", out
    )
    with_template = ("--out", out, "--chat-template", template)
    assert f"--chat-template {template}: No such file" in refuse(tiny_teacher, chats, *with_template)
    template.write_bytes(b"\xff")
    assert f"--chat-template {template}: not UTF-8" in refuse(tiny_teacher, chats, *with_template)
    template.write_text("{% for %}")
    assert f"--chat-template {template}: line 1 is no Jinja" in refuse(tiny_teacher, chats, *with_template)
    template.write_text("{% for m in messages %}{{ m.content | upper }} {% endfor %}")
    assert "row 0: the chat template does not write" in refuse(tiny_teacher, chats, *with_template)
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    for row, expected in (
        ("hello", "holds no list"),
        ([{"role": "user"}], "message 0: content has to be text, it is missing"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "it is list"),
    ):
        line = refuse(tiny_teacher, chats_of(tmp_path / "bad.jsonl", row), *with_template)
        assert "--messages-column messages: row 0" in line and expected in line
    silent = chats_of(tmp_path / "silent.jsonl", good[:1], good[:1])
    assert "DATASET: empty" in (line := refuse(tiny_teacher, silent, *with_template))
    assert "2 nothing learned" in line
    assert not out.exists()


def test_chats_or_texts(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"text": "a token", "messages": []}))
    assert "both a text and a messages column" in refuse(tiny_teacher, both, "--out", out)
    assert "--loss-on assistant" in refuse(tiny_teacher, corpus, "--out", out, "--loss-on", "assistant")
    assert "--chat-template x" in refuse(tiny_teacher, corpus, "--out", out, "--chat-template", "x")
    assert "--messages-column m" in refuse(tiny_teacher, corpus, "--out", out, "--messages-column", "m")
    text = tmp_path / "text.txt"
    text.write_text("a token")
    assert "without columns" in refuse(tiny_teacher, text, "--out", out, "--messages-column", "m")
    named = ("--text-column", "text", "--messages-column", "messages")
    assert "one of the two" in refuse(tiny_teacher, both, "--out", out, *named)


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
        (["--hidden-layers", "1", "--hidden-positions", "0"], "--hidden-positions 0: a share in (0, 1]"),
        (["--hidden-layers", "1", "--hidden-positions", "1.5"], "--hidden-positions 1.5: a share in (0, 1]"),
        (["--hidden-positions", "0.5"], "--hidden-positions 0.5: has no effect without --hidden-layers"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--min-seq-len", "1"], "--min-seq-len 1: must be at least 2"),
        (["--min-seq-len", "257"], "--min-seq-len 257: longer than the longest sample, 256"),
        (["--min-seq-len", "9"], "at least 9 tokens"),
        (["--shuffle-seed", "-1"], "--shuffle-seed -1"),
        (["--long", "cut"], "--long cut: choose one of split, drop"),
        (["--max-seq-len", "4", "--long", "drop"], "3 too long"),
        (["--loss-on", "user"], "--loss-on user: choose one of assistant, all"),
        (["--teacher-load-in-4bit"], "--teacher-load-in-4bit: vLLM loads 4-bit teachers only from"),
        (["--teacher_load_in_8bit", "True", "--teacher_load_in_4bit", "True"], "choose one"),
        (["--top-k", "0"], "--top-k 0"),
        (["--temperatures", "1"], "--temperatures 1: a temperature is a number from 0.05 to 100"),
        (["--temperatures", "2,0"], "--temperatures 0: a temperature"),
        (["--temperatures", "nan"], "--temperatures nan: a temperature"),
        (["--temperatures", "0.1234"], "--temperatures 0.1234: a temperature"),
        (["--temperatures", "2,2.0"], "--temperatures: the same temperature is named twice"),
        (["--temperatures", "warm"], "--temperatures warm: give numbers"),
        (["--continuations", "0"], "--continuations 0: must be at least 1"),
        (["--continuations", "2", "--prompt-tokens", "0"], "--prompt-tokens 0: must be at least 1"),
        (["--prompt-tokens", "9"], "--prompt-tokens: has no effect without --continuations"),
        (["--from-student", "./s"], "--from-student: has no effect without --continuations"),
        (["--continuations", "2", "--continuation-temperature", "-1"], "--continuation-temperature -1.0"),
        (["--continuations", "2", "--continuation-temperature", "nan"], "--continuation-temperature nan"),
        (["--continuations", "2", "--continuation-temperature", "2.1"], "--continuation-temperature 2.1"),
        (["--continuations", "2", "--continuation-temperature", "0"], "--continuations 2: at"),
        (["--continuations", "2", "--continuation-top-p", "1.5"], "--continuation-top-p 1.5"),
        (["--continuations", "2", "--continuation-max-tokens", "0"], "--continuation-max-tokens 0"),
        (
            ["--continuations", "1", "--continuation-max-tokens", "193"],
            "--prompt-tokens 64 and --continuation-max-tokens 193 make 257, but a sample has at most 256",
        ),
        (["--continuations", "1", "--pack"], "--pack: not with --continuations"),
        (["--continuations", "1", "--loss-on", "all"], "--loss-on all: not with --continuations"),
        (["--continuations", "1", "--from-student", "./none"], "--from-student ./none: no such directory"),
    ],
)
def test_bad_options(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, options: list[str], expected: str
) -> None:
    assert expected in refuse(tiny_teacher, corpus, "--out", out, *options)
    assert not out.exists()


def test_a_student_that_cannot_write_for_this_teacher(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, tmp_path: Path
) -> None:
    def refused(student: Path) -> str:
        return refuse(tiny_teacher, corpus, "--out", out, "--continuations", 1, "--from-student", student)

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert f"--from-student {pickled}: no safetensors weights" in refused(pickled)
    wide = teachers.llama(tmp_path / "wide", vocab_size=203)
    assert f"--from-student {wide}: its tokenizer is not the teacher's" in refused(wide)
    narrow = teachers.llama(tmp_path / "narrow", vocab_size=150)
    shutil.copy(tiny_teacher / "tokenizer.json", narrow)
    assert "its vocabulary has 150 tokens" in refused(narrow)
    other = teachers.llama(tmp_path / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["learns"], vocabulary["a"] = vocabulary["a"], vocabulary["learns"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"--from-student {other}: its tokenizer is not the teacher's" in refused(other)
    assert not out.exists()


def test_a_quantised_teacher_is_not_quantised_again(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "quantised"
    shutil.copytree(tiny_teacher, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    for engine in ("vllm", "transformers"):
        line = refuse(copy, corpus, "--out", out, "--engine", engine, "--teacher-load-in-8bit")
        assert "--teacher-load-in-8bit: the teacher is saved as awq already" in line


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


def test_a_directory_in_which_a_store_was_about_to_be_made_is_free(tmp_path: Path) -> None:
    """By a command that was killed, or by one that is at it now."""
    (tmp_path / f"{TEMPORARY}0123456789abcdef").write_text("{")
    check_store_directory(str(tmp_path))


def test_teacher_and_data_set_the_wrong_way_round(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path
) -> None:
    assert "TEACHER" in refuse(corpus, tiny_teacher, "--out", out)
    line = refuse(tiny_teacher, tiny_teacher, "--out", out)
    assert "is a model checkpoint, not a data set; TEACHER comes first" in line


def test_a_store_in_the_home_directory(
    tiny_teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells do not expand the ~ of --out=~/cache; a directory called ~ is not what was meant."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    generate(tiny_teacher, corpus, Path("~/cache"))
    assert (tmp_path / "home" / "cache" / "SPEC.json").is_file() and not (tmp_path / "~").exists()
    call("distily-cache", "export", "~/cache", "~/rows")
    assert (tmp_path / "home" / "rows").is_dir()


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


def test_a_share_of_gpu_memory_without_a_gpu(
    refuse: Callable[..., str], tiny_teacher: Path, corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = ("--out", out, "--gpu-memory-utilization", 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refuse(tiny_teacher, corpus, *flag)
    assert "--gpu-memory-utilization 0.5: there is no GPU here; leave it out" in line
    assert not out.exists()
    # Where there is one the flag is taken, and the next thing that is wrong is named.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no such file" in refuse(tiny_teacher, corpus.with_name("none.txt"), *flag)


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
