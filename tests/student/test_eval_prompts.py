"""`eval --prompts` and `--trained-samples`: what both models write, against transformers' own `generate`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.reader import CacheReader
from student.evaluation.continuations import read_prompts
from student.report import read_runs, runs_page
from tests import html, teachers
from tests.student.exports import Students
from tests.student.splits import split_samples

Refused = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]
PROMPTS = ["the teacher learns", "a <b>cache</b> & \u202etoken\x0b of\u2028the student", "  is in"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_bytes(("\ufeff" + "\r\n\n \t\n".join(PROMPTS) + "\n").encode())
    return file


@torch.no_grad()
def generated(directory: Path, prompt: str, new: int) -> list[int]:
    """The most likely tokens after a prompt, as transformers finds them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    output: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, ids.shape[1] :].tolist()


def evaluated(distily: Run, student: Path, *flags: object) -> dict[str, Any]:
    code, out, err = distily("eval", student, *flags, "--json")
    assert code == 0, err
    record: dict[str, Any] = json.loads(out)
    return record


def test_both_continue_as_transformers_does(
    distily: Run, student: Path, prompts: Path, tmp_path: Path
) -> None:
    big = teachers.qwen3(tmp_path / "big", vocab_size=199)
    # A checkpoint's own settings do not count, but for the tokens that end a text.
    before = generated(big, PROMPTS[0], 9)
    settings = {"eos_token_id": [2, before[4]], "repetition_penalty": 5.0, "do_sample": True}
    (big / "generation_config.json").write_text(json.dumps(settings))
    flags = ("--prompts", prompts, "--max-new-tokens", 9)
    record = evaluated(distily, student, *flags, "--teacher", big, "--teacher-dtype", "float32")
    found = record["prompts"]
    assert (found["prompts"], found["max_new_tokens"], record["cache"]) == (PROMPTS, 9, None)
    tokenizer = AutoTokenizer.from_pretrained(student)
    for number, prompt in enumerate(PROMPTS):
        tokens, own = generated(student, prompt, 9), found["student"]["continuations"][number]
        assert (own["text"].split(), own["new_tokens"]) == (tokenizer.decode(tokens).split(), len(tokens))
        assert own["prompt_tokens"] == len(tokenizer(prompt).input_ids)
    theirs = found["teacher"]["continuations"][0]
    end = before.index(before[4])
    assert theirs["text"].split() == tokenizer.decode(before[:end]).split()
    assert (theirs["new_tokens"], theirs["ended"]) == (end + 1, True)
    for side in (found["student"], found["teacher"]):
        assert side["new_tokens"] == sum(one["new_tokens"] for one in side["continuations"])
        assert side["tokens_per_second"] == pytest.approx(side["new_tokens"] / side["seconds"])
        assert (side["dtype"], side["threads"]) == ("float32", torch.get_num_threads())
    assert found["teacher"]["checkpoint_bytes"] == (big / "model.safetensors").stat().st_size
    # What is measured later stands beside it; the teacher's words go with their teacher.
    (tmp_path / "a.txt").write_text("the teacher is a student")
    other = teachers.llama(tmp_path / "other", layers=1)
    record = evaluated(distily, student, "--text", tmp_path / "a.txt", "--teacher", other)
    assert record["prompts"] == found | {"teacher": None}


def test_ternary_students_are_shown_with_their_exports(
    distily: Run, students: Students, prompts: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(students("llama", hidden_size=64), tmp_path / "ternary"))
    (student / "summary.json").write_text("{}")
    big = teachers.llama(tmp_path / "big", layers=2, seed=3)
    code, out, err = distily("export", student, "--format", "hf-bitnet", "--json")
    assert code == 0, err
    exported = json.loads(out)
    code, out, err = distily("eval", student, "--prompts", prompts, "--teacher", big, "--max-new-tokens", 4)
    assert code == 0, err
    assert "a <b>cache</b> & \\u202etoken\\x0b" in out and "tokens/s" in out
    page = runs_page(read_runs([student]))
    shown = html.page(page).texts["span"]
    texts = json.loads((student / "eval.json").read_text())["prompts"]
    for side in ("student", "teacher"):
        for one in texts[side]["continuations"]:
            assert one["text"] + " ∎" * one["ended"] in shown
    assert "&lt;b&gt;cache&lt;/b&gt; &amp; \\u202etoken\\x0b" in page and "<b>cache" not in page
    size = f"{exported['bytes'] / 1e3:,.1f} kB"
    assert f"hf-bitnet: {size}" in page
    # An export of other weights is not this student's.
    record = json.loads((student / "eval.json").read_text())
    (student / "eval.json").write_text(json.dumps(record | {"weights": "other"}))
    assert size not in runs_page(read_runs([student]))


def test_prompts_in_a_chat_template(distily: Run, student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("token")
    flags = ("--prompts", tmp_path / "p.txt", "--max-new-tokens", 5, "--chat")
    (student / "chat_template.jinja").write_text("the {{ messages[0]['content'] }} of a")
    found = evaluated(distily, student, *flags)["prompts"]
    (own,) = found["student"]["continuations"]
    tokens = generated(student, "the token of a", 5)
    assert own["text"].split() == AutoTokenizer.from_pretrained(student).decode(tokens).split()
    assert (own["prompt_tokens"], found["chat"], found["teacher"]) == (4, True, None)


def test_samples_that_were_trained_on_stand_beside_the_others(
    distily: Run, student: Path, cache: Path
) -> None:
    record = evaluated(distily, student, "--trained-samples")
    reader = CacheReader.open(cache)
    split = split_samples(reader.sample_ids, 0.25)
    assert (record["cache"]["samples"], record["trained"]["samples"]) == tuple(
        map(len, (split.held_out, split.training))
    )
    every = evaluated(distily, student, "--all-samples")
    assert every["trained"] == record["trained"]
    parts = [record["cache"], record["trained"]]
    nats = sum(part["positions"] * part["student"]["ce"] for part in parts)
    assert nats / every["cache"]["positions"] == pytest.approx(every["cache"]["student"]["ce"], rel=1e-5)
    assert "on samples trained on" in runs_page(read_runs([student]))


def test_what_cannot_be_continued(refused: Refused, student: Path, prompts: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    long = tmp_path / "long.txt"
    long.write_text("token\n" + " ".join(["token"] * 250))
    for file, flags, said in (
        (empty, (), f"--prompts {empty}: holds no prompt"),
        (tmp_path / "none.txt", (), "cannot be read"),
        (long, (), "prompt 2 has 250 tokens, and with --max-new-tokens 64 they are more than the 256"),
        (prompts, ("--chat",), f"--chat: the tokenizer of {student} has no chat template"),
        (prompts, ("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
    ):
        assert said in refused("eval", student, "--prompts", file, *flags)
    for flags in (("--chat",), ("--max-new-tokens", 3)):
        assert f"{flags[0]} has no effect without --prompts" in refused("eval", student, *flags)
    both = refused("eval", student, "--all-samples", "--trained-samples")
    assert "keep one of the flags" in both
    assert "another --eval-fraction" in refused("eval", student, "--trained-samples", "--eval-fraction", 0.5)
    summary = json.loads((student / "summary.json").read_text())
    del summary["train_samples"]
    (student / "summary.json").write_text(json.dumps(summary))
    assert "which they were" in refused("eval", student, "--trained-samples")


def test_lines_are_the_files(prompts: Path) -> None:
    assert read_prompts(prompts) == PROMPTS
