"""What the tests of written texts share: a teacher that ends its texts now and then, and a quiet reporter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from featurestore.reader import CacheReader
from pipeline.generate.run import Outcome, execute, prepare
from pipeline.request.generate import GenerateRequest
from pipeline.request.writing import WritingRequest
from tests import teachers

PROMPTS, MAX_TOKENS, END = 10, 12, 2


def teacher(directory: Path, seed: int = 0) -> Path:
    """V=17, flat enough that </s> comes now and then."""
    teachers.llama(directory, vocab_size=17, layers=2, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1 / 40)
    model.save_pretrained(directory)
    return directory


def corpus(file: Path, count: int = PROMPTS) -> Path:
    """Documents of 2 to 11 words, so that most are shorter than the 8 tokens of a prompt."""
    texts = [np.random.default_rng(n).choice(teachers.WORDS, size=2 + n % 10).tolist() for n in range(count)]
    file.write_text("\n".join(json.dumps({"text": " ".join(words)}) for words in texts))
    return file


def request(model: Path, data: Path, out: Path, continuations: int = 2, **more: object) -> GenerateRequest:
    flags = {"student": None, "temperature": 1.5, "top_p": 1.0, "seed": 0, "batch": 4096, "k": 4} | more
    return GenerateRequest(
        teacher=str(model),
        dataset=str(data),
        out=str(out),
        engine="transformers",
        top_k=flags["k"],
        max_seq_len=32,
        shard_tokens=64,
        max_num_batched_tokens=flags["batch"],
        seed=flags["seed"],
        writing=WritingRequest(
            continuations=continuations,
            prompt_tokens=8,
            continuation_temperature=flags["temperature"],
            continuation_top_p=flags["top_p"],
            continuation_max_tokens=MAX_TOKENS,
            from_student=flags["student"] and str(flags["student"]),
        ),
    )


class Silent:
    """A reporter that keeps the stages that it is told of, and does what `on_written` says after a batch."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def reading(self, rows: int) -> None: ...
    def tokenised(self, documents: int, tokens: int) -> None: ...

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def writing(self, texts_done: int, texts_total: int) -> None: ...

    def wrote(self, texts: int, tokens: int) -> None: ...

    def start(self, tokens_done: int, tokens_total: int) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def skip(self, tokens: int) -> None: ...

    def committed(self, rows: int, size: int) -> None: ...


def generate(asked: GenerateRequest, report: Silent | None = None) -> Outcome:
    """Fulfil the request as the command does."""
    report = report or Silent()
    return execute(prepare(asked, report), report)


def texts_of(store: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, written) of every sample, sorted."""
    reader = CacheReader.open(store)
    samples = (reader.read(index, []) for index in range(len(reader)))
    return sorted(
        (tuple(s.tokens[~s.loss_mask].tolist()), tuple(s.tokens[s.loss_mask].tolist())) for s in samples
    )


if __name__ == "__main__":
    model, data, out = map(Path, sys.argv[1:])
    generate(request(model, data, out, continuations=6))
