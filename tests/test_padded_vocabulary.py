"""Rows that pad a teacher's LM head are no tokens: not in what is captured, and no bar to training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.format.codec import ROW_ERROR
from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.reader import CacheReader
from tests import architectures
from tests.command import call
from tests.teachers import text_of

PADDED = architectures.VOCAB + 21
SPEC = LogitsSpec(12, tail=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its padding rows are as strong as any other: uncut, one in ten of its favourites would be none."""
    return architectures.make("llama", tmp_path_factory.mktemp("padded") / "teacher", vocab_size=PADDED)


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(50, seed)}) for seed in range(12)))
    flags = ("--engine", "transformers", "--top-k", 12, "--tail", 8)
    call("distily-cache", "generate", teacher, corpus, "--out", folder / "store", *flags)
    return folder / "store"


def test_features_are_over_the_tokens(teacher: Path, cache: Path) -> None:
    reader = CacheReader.open(cache)
    assert reader.identity.vocab_size == architectures.VOCAB
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    favourites = 0
    for index in range(len(reader)):
        sample = reader.read(index)
        features = sample.features[SPEC]
        assert isinstance(features, LogitsFeatures) and features.tail_ids is not None
        assert max(features.ids.max(), features.tail_ids.max()) < architectures.VOCAB
        with torch.inference_mode():
            logits = model(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0].double()
        favourites += int((logits.argmax(-1) >= architectures.VOCAB).sum())
        expected = logits[:, : architectures.VOCAB].logsumexp(-1).numpy()
        np.testing.assert_allclose(features.lse, expected, atol=ROW_ERROR + 1e-4)
    assert favourites, "the padding of this teacher would not have been seen"


@pytest.mark.parametrize("padded", [PADDED, architectures.VOCAB + 5, architectures.VOCAB])
def test_students_padded_otherwise_learn_from_it(
    teacher: Path, cache: Path, tmp_path: Path, padded: int
) -> None:
    source: tuple[object, ...] = ("--student-model-config", '{"num_hidden_layers": 2}', "--teacher", teacher)
    if padded != PADDED:
        source = ("--student", architectures.make("llama", tmp_path / "student", seed=1, vocab_size=padded))
    steps = ("--max-steps", 3, "--eval-fraction", 0.25)
    call("distily-train", "from-cache", cache, "--output-dir", tmp_path / "out", *source, *steps)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.config.vocab_size == padded
    assert all(weight.isfinite().all() for weight in trained.parameters())


def test_a_student_without_all_the_tokens_is_refused(cache: Path, tmp_path: Path) -> None:
    student = architectures.make("llama", tmp_path / "student", vocab_size=architectures.VOCAB - 1)
    flags = ("--output-dir", tmp_path / "out", "--student", student)
    done = call("distily-train", "from-cache", cache, *flags, code=2)
    assert f"{architectures.VOCAB - 1} tokens" in done.stderr
