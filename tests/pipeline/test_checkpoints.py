"""Checkpoints that are not whole are refused before an engine; whole ones, in whatever layout, load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.engines.base import EngineConfig
from pipeline.engines.loading import load_causal_lm
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import load_teacher
from tests import architectures, checkpoints, teachers
from tests.checkpoints import UNTIED, Tensors, copy_of
from tests.command import call, generate
from tests.student.exports import save


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachers.qwen3(tmp_path_factory.mktemp("untied") / "teacher", vocab_size=199)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachers.llama(tmp_path_factory.mktemp("tied") / "teacher")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": teachers.text_of(20, seed)}) for seed in range(3)))
    return file


def refusal(*arguments: object) -> str:
    """The one line of `generate`; one that started an engine would have printed another."""
    done = call("distily-cache", "generate", *arguments, code=2)
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", UNTIED)
def test_a_damaged_teacher(untied: Path, corpus: Path, tmp_path: Path, name: str) -> None:
    damage, words = UNTIED[name]
    directory, out = copy_of(untied, tmp_path / "damaged"), tmp_path / "store"
    damage(directory)
    for engine in ("vllm", "transformers"):
        line = refusal(directory, corpus, "--out", out, "--engine", engine)
        assert "TEACHER" in line
        for word in words:
            assert word in line, line
    assert not out.exists()


def test_a_damaged_writer(untied: Path, corpus: Path, tmp_path: Path) -> None:
    student, chats = copy_of(untied, tmp_path / "student"), tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "the cache"}]}))
    checkpoints.without("lm_head.weight")(student)
    flags = ("--engine", "transformers", "--continuations", 1, "--from-student", student)
    line = refusal(untied, corpus, "--out", tmp_path / "store", *flags)
    assert "--from-student" in line
    assert "lm_head.weight" in line


def test_norms_that_only_quantised_layers_have(tmp_path: Path) -> None:
    """They are missed when the model is loaded: the one that is built to compare names has none."""
    directory = save(tmp_path / "student", "llama", "per-projection")
    model = load_teacher(str(directory))
    config = EngineConfig(
        model=directory,
        architecture=model.architecture,
        groups=(),
        dtype="float32",
        max_seq_len=16,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
    )
    load_causal_lm(config)
    name = "model.layers.1.mlp.down_proj.rms_norm.weight"
    checkpoints.without(name)(directory)
    with pytest.raises(RequestError, match=f"lacks {name}"):
        load_causal_lm(config)


def test_a_tokenizer_that_is_a_pointer(untied: Path, corpus: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "config.json"):
        directory = copy_of(untied, tmp_path / file)
        checkpoints.pointer(file)(directory)
        line = refusal(directory, corpus, "--out", tmp_path / "store", "--engine", "transformers")
        assert f"{file} is a Git LFS pointer" in line


def test_both_names_of_tied_weights_will_do(tied: Path, corpus: Path, tmp_path: Path) -> None:
    """A tied file holds the embeddings, or the head, or both."""
    embeddings = "model.embed_tokens.weight"
    other, both, neither = (copy_of(tied, tmp_path / name) for name in ("other", "both", "neither"))

    def renamed(tensors: Tensors) -> Tensors:
        return {"lm_head.weight" if name == embeddings else name: one for name, one in tensors.items()}

    checkpoints.rewrite(other, renamed)
    checkpoints.rewrite(both, lambda all_: all_ | {"lm_head.weight": all_[embeddings].clone()})
    checkpoints.without(embeddings)(neither)
    stores = [tmp_path / f"store-{name}" for name in ("tied", "other", "both")]
    for teacher, store in zip((tied, other, both), stores, strict=True):
        generate(teacher, corpus, store, "--final")
    heads = [next((store / "teacher").glob("head-*")) for store in stores]
    weights = [load_file(head)["weight"].numpy() for head in heads]
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[0], weights[2])
    assert "embed_tokens" in refusal(neither, corpus, "--out", tmp_path / "none")


@pytest.mark.parametrize("model_type", [*architectures.CONFIGS, *architectures.MANY_STREAMS])
def test_every_architecture_is_whole_until_a_weight_is_gone(model_type: str, tmp_path: Path) -> None:
    directory = architectures.make(model_type, tmp_path / model_type)
    assert load_teacher(str(directory)).architecture
    names = sorted(load_file(directory / checkpoints.WEIGHTS))
    lost = np.random.default_rng(len(names)).choice(
        [name for name in names if ".layers." in name or ".h." in name]
    )
    checkpoints.without(str(lost))(directory)
    with pytest.raises(RequestError, match="lacks"):
        load_teacher(str(directory))


def test_shards_are_the_whole_in_one_file(untied: Path, corpus: Path, tmp_path: Path) -> None:
    shards = copy_of(untied, tmp_path / "shards")
    checkpoints.shard(shards)
    assert generate(shards, corpus, tmp_path / "store")["tokens"] > 0


def test_old_checkpoints_with_buffers_are_whole(tied: Path, tmp_path: Path) -> None:
    """Files of former years hold buffers that the model makes itself now, and heads that are not loaded."""
    import torch

    directory = copy_of(tied, tmp_path / "old")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "mtp.layers.0.weight": torch.full((4, 4), torch.nan),
    }
    checkpoints.rewrite(directory, lambda all_: all_ | more)
    assert load_teacher(str(directory)).vocab_size == 199
