"""Chats through `distily-cache`: masks in the store, what was left out, and what provenance keeps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from featurestore.reader import CacheReader
from tests import teachers
from tests.command import call, generate
from tests.pipeline.writing import teacher

run = partial(call, "distily-cache")

TEMPLATE = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    rows: list[list[tuple[str, str]]] = [
        [("user", "a token"), ("assistant", "the cache learns .")],
        [("user", "a token"), ("assistant", "the cache learns .")],
        [("user", "the student is"), ("assistant", "in the cache"), ("user", "and"), ("assistant", "a , .")],
        [("user", "of the teacher")],
    ]
    lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def learned_texts(store: Path) -> set[tuple[str, str]]:
    """Of each sample: all its words, and those that are learned."""
    tokenizer = teachers.word_tokenizer(199)
    reader = CacheReader.open(store)
    samples = [reader.read(index) for index in range(len(reader))]
    return {(tokenizer.decode(s.tokens), tokenizer.decode(s.tokens[s.loss_mask])) for s in samples}


def test_chats_are_captured(tiny_teacher: Path, chats: Path, tmp_path: Path) -> None:
    store, template = tmp_path / "store", tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template, "--shuffle-seed", 5)
    made: dict[str, Any] = generate(tiny_teacher, chats, store, *options)
    expected = {
        "empty": 0,
        "too_short": 0,
        "too_long": 0,
        "nothing_learned": 1,
        "duplicates": 1,
        "bad_rows": 0,
    }
    assert made["left_out"] == expected and made["samples"] == 2
    short = "a token </s> the cache learns . </s>", "the cache learns . </s>"
    long = (
        "the student is </s> in the cache </s> and </s> a , . </s>",
        "in the cache </s> a , . </s>",
    )
    assert learned_texts(store) == {short, long}
    arguments = ("plan", tiny_teacher, chats, "--out", store, "--engine", "transformers", *options)
    assert json.loads(run(*arguments, "--json").stdout)["left_out"] == expected
    assert "left out: 1 nothing learned, 1 duplicates" in " ".join(run(*arguments).stdout.split())
    (record,) = json.loads(run("info", store, "--json").stdout)["provenance"]
    assert (record["left_out"], record["chat_template"]) == (expected, TEMPLATE)


def test_chats_are_continued_from_before_the_assistants_last_turn(chats: Path, tmp_path: Path) -> None:
    model = teacher(tmp_path / "teacher")
    store, template = tmp_path / "store", tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template, "--continuations", 2, "--continuation-max-tokens", 55)
    made: dict[str, Any] = generate(model, chats, store, *options)
    # Of 64 tokens 9 are left to the prompt; a chat that nobody answers has none.
    expected = {
        "empty": 1,
        "too_short": 0,
        "too_long": 1,
        "nothing_learned": 0,
        "duplicates": 1,
        "bad_rows": 0,
    }
    assert made["left_out"] == expected
    assert made["writing"]["texts"] == 2
    texts = learned_texts(store)
    assert texts and all(text == f"a token </s> {written}" for text, written in texts)
    longer: dict[str, Any] = generate(model, chats, store, *options[:-1], 54)
    assert longer["left_out"]["too_long"] == 0 and longer["writing"]["texts"] == 4
    prompts = {text.removesuffix(written).strip() for text, written in learned_texts(store)}
    assert prompts == {"a token </s>", "the student is </s> in the cache </s> and </s>"}
    plan = ("plan", model, chats, "--out", store, "--engine", "transformers", "--max-seq-len", 64)
    for more, expected in (
        (("--prompt-tokens", 8), "--prompt-tokens 8: a chat is not cut"),
        (("--continuation-max-tokens", 64), "--continuation-max-tokens 64: leaves nothing"),
    ):
        refused = run(*plan, "--chat-template", template, "--continuations", 1, *more, code=2)
        assert expected in refused.stderr


def test_packed_chats_keep_their_masks(tiny_teacher: Path, chats: Path, tmp_path: Path) -> None:
    store, template = tmp_path / "store", tmp_path / "chat.jinja"
    template.write_text(TEMPLATE.replace(" {{ eos_token }}", ""))
    generate(tiny_teacher, chats, store, "--chat-template", template, "--pack", "--num-samples", 1)
    ((text, learned),) = learned_texts(store)
    assert text == (
        "a token the cache learns . </s> a token the cache learns . </s> "
        "the student is in the cache and a , . </s> of the teacher"
    )
    assert learned == "the cache learns . the cache learns . in the cache a , ."
