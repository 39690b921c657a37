"""The teacher writes in vLLM and is captured in vLLM: two engines, one after the other, in one command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from featurestore.maintenance.verify import verify_store
from tests.command import call
from tests.pipeline.writing import END, corpus, teacher, texts_of


def generate(*arguments: object) -> dict[str, Any]:
    """What the command prints. Its engines have processes of their own; what it sets for them is set back."""
    with patch.dict(os.environ):
        made: dict[str, Any] = json.loads(call("distily-cache", "generate", *arguments, "--json").stdout)
    return made


@pytest.mark.vllm
def test_the_teacher_writes_is_captured_and_resumed(tmp_path: Path) -> None:
    model, data = teacher(tmp_path / "teacher"), corpus(tmp_path / "corpus.jsonl")
    flags = ("--dtype", "float32", "--max-seq-len", 32, "--shard-tokens", 64, "--top-k", 4)
    flags += ("--continuations", 2, "--prompt-tokens", 8, "--continuation-max-tokens", 12)
    whole = tmp_path / "whole"
    made = generate(model, data, "--out", whole, *flags)
    texts = texts_of(whole)
    assert made["writing"]["new"] == len(texts) == 20
    assert made["tokens"] == sum(len(prompt) + len(text) for prompt, text in texts)
    ended = [text for _, text in texts if text[-1] == END]
    assert ended and len(ended) < len(texts) and all(END not in text[:-1] for _, text in texts)
    assert all(len(text) == 12 for _, text in texts if text[-1] != END)
    assert verify_store(whole, deep=True).sound

    # A piece of what was written is lost. Its texts are written as they were, so they are captured already.
    killed = shutil.copytree(whole, tmp_path / "killed")
    last = sorted(killed.glob("written/*/*.json"))[-1]
    left = len(json.loads(last.read_text())["texts"])
    last.unlink()
    resumed = generate(model, data, "--out", killed, *flags)
    assert (resumed["writing"]["new"], resumed["tokens"]) == (left, 0)
    assert texts_of(killed) == texts

    again = call("distily-cache", "generate", model, data, "--out", whole, *flags)
    assert "nothing to generate" in again.stderr and "starting" not in again.stderr
