"""Real stores for the training tests: features computed by transformers from a tiny teacher, written
by featurestore.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from featurestore.format import sidecar
from featurestore.format.plan import split_tasks
from featurestore.format.schema import (
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
    Sample,
    TeacherIdentity,
)
from featurestore.format.sidecar import HeadSpec
from featurestore.store import FeatureStore
from tests.teachers import word_tokenizer

TOKENIZER = "cd" * 16  # digest


def save_teacher(directory: Path, layers: int = 3) -> Path:
    """A random Llama (V=199, D=64, tied) whose layers matter: its distributions are neither flat nor
    certain.
    """
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    word_tokenizer(199).save_pretrained(directory)
    return directory


def random_samples(
    count: int, vocab_size: int, lengths: tuple[int, int] = (5, 24), seed: int = 0
) -> list[Sample]:
    """Samples over a few tokens (so that there is something to learn), ragged, the first third
    partly masked.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(*lengths))
        tokens = rng.integers(3, min(17, vocab_size), length).astype(np.int32)
        mask = np.ones(length, bool)
        if index % 3 == 0:
            mask[: length // 2] = False
        samples.append(Sample(tokens=tokens, loss_mask=mask))
    return samples


def write_cache(
    path: Path,
    teacher: Path,
    samples: list[Sample],
    groups: list[GroupSpec],
    shard_tokens: int = 200,
    digest: str = "ab" * 16,
) -> Path:
    """A complete store at `path`; digest: of the teacher."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    return _write(
        path=path,
        teacher=teacher,
        config=model.config,
        samples=samples,
        features=lambda sample: features_of(model, sample, groups),
        shard_tokens=shard_tokens,
        digest=digest,
    )


def write_given_cache(
    path: Path,
    teacher: Path,
    samples: list[Sample],
    features: Callable[[Sample], dict[GroupSpec, GroupFeatures]],
    digest: str = "ab" * 16,
    tokenizer: str = TOKENIZER,
) -> Path:
    """A store with the shape of a teacher, and the numbers that `features` makes of a sample."""
    return _write(
        path=path,
        teacher=teacher,
        config=AutoConfig.from_pretrained(teacher),
        samples=samples,
        features=features,
        shard_tokens=200,
        digest=digest,
        tokenizer=tokenizer,
    )


def write_unreal_cache(path: Path, teacher: Path, samples: list[Sample]) -> Path:
    """A store of the default spec that holds nothing a teacher has said, so that of one of any size a
    configuration and a tokenizer are enough.
    """
    config = AutoConfig.from_pretrained(teacher)
    return _write(
        path=path,
        teacher=teacher,
        config=config,
        samples=samples,
        features=lambda sample: _unreal(sample, config.vocab_size),
        shard_tokens=2**15,
        digest="ab" * 16,
    )


def _write(
    *,
    path: Path,
    teacher: Path,
    config: Any,
    samples: list[Sample],
    features: Callable[[Sample], dict[GroupSpec, GroupFeatures]],
    shard_tokens: int,
    digest: str,
    tokenizer: str = TOKENIZER,
) -> Path:
    identity = TeacherIdentity(
        name=str(teacher),
        architecture=config.architectures[0],
        digest=digest,
        tokenizer_digest=tokenizer,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_position=config.max_position_embeddings,
        engine="transformers",
        engine_version="5",
        dtype="float32",
        quantization="none",
    )
    store = FeatureStore.create(path, identity)
    store.put_teacher_files(
        {file.name: file.read_bytes() for file in teacher.iterdir() if file.suffix in (".json", ".jinja")}
    )
    by_id = {sample.id: sample for sample in samples}
    tasks = split_tasks([(sample.id, len(sample)) for sample in samples], shard_tokens)
    store.add_plan(tasks)
    for task in tasks:
        members = [by_id[sample_id] for sample_id in task.sample_ids]
        computed = [features(sample) for sample in members]
        store.write_bundle(task, members, {spec: [one[spec] for one in computed] for spec in computed[0]})
    store.add_provenance({"tokens": sum(map(len, samples)), "capture_seconds": 2.0, "engine_seconds": 1.0})
    store.publish_manifest()
    return path


def _unreal(sample: Sample, vocab_size: int) -> dict[GroupSpec, GroupFeatures]:
    """Heads and draws of distinct tokens, the same probabilities everywhere."""
    spec, count = LogitsSpec(12, 0.7, 16), len(sample)
    first_T1 = np.random.default_rng(int(sample.id[:8], 16)).integers(vocab_size, size=(count, 1))
    logits_K = 10 - 0.3 * np.arange(spec.top_k, dtype=np.float32)
    label = np.full(count, -2.0, np.float32)
    label[-1] = np.nan
    # Steps of 9,973 never meet those of 7 that begin at 5,000.
    ids_TK = (first_T1 + 9973 * np.arange(spec.top_k)) % vocab_size
    draws_TM = np.sort((first_T1 + 5000 + 7 * np.arange(spec.tail)) % vocab_size)
    return {
        spec: LogitsFeatures(
            counts=np.full(count, spec.top_k, np.uint16),
            ids=ids_TK.ravel().astype(np.uint32),
            logits=np.tile(logits_K, count),
            lse=np.full(count, np.log(np.exp(logits_K).sum() / 0.7), np.float32),
            label_logprob=label,
            entropy=np.full(count, 3.0, np.float32),
            tail_ids=draws_TM.astype(np.int32),
        )
    }


def put_head(path: Path, teacher: Path) -> None:
    """Add the teacher's LM head to a store, as `generate --final` does."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    spec = HeadSpec(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        norm_eps=model.config.rms_norm_eps,
    )
    weights = {"weight": model.lm_head.weight, "norm.weight": model.get_decoder().norm.weight}
    stored = {name: sidecar.Tensor("f32", w.detach().numpy()) for name, w in weights.items()}
    writer = FeatureStore.open(path)
    writer.put_teacher_files(dict([sidecar.part_file(spec, stored)]))
    writer.publish_manifest()


@torch.no_grad()
def features_of(
    model: torch.nn.Module, sample: Sample, groups: list[GroupSpec]
) -> dict[GroupSpec, GroupFeatures]:
    """What the design says of every column group, straight from one forward pass."""
    ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
    output = model(input_ids=ids, output_hidden_states=True)
    return {
        spec: logits_of(output.logits[0], ids[0], spec)
        if isinstance(spec, LogitsSpec)
        else lse_of(output.logits[0], spec)
        if isinstance(spec, LseSpec)
        else hidden_of(output.hidden_states[spec.layer][0], spec)
        for spec in groups
    }


def lse_of(logits_TV: torch.Tensor, spec: LseSpec) -> LseFeatures:
    return LseFeatures((logits_TV.double() / spec.temperature).logsumexp(-1).float().numpy())


def logits_of(logits_TV: torch.Tensor, ids_T: torch.Tensor, spec: LogitsSpec) -> LogitsFeatures:
    logprob_TV = logits_TV.double().log_softmax(-1)
    top = logits_TV.topk(spec.top_k, dim=-1)
    head_p = logprob_TV.gather(1, top.indices).exp()
    keep = torch.ones_like(head_p, dtype=torch.bool)
    if spec.top_p is not None:
        keep = head_p.cumsum(-1) - head_p < spec.top_p
    label = np.full(len(ids_T), np.nan, np.float32)
    label[:-1] = logprob_TV[:-1].gather(1, ids_T[1:, None])[:, 0].float().numpy()
    return LogitsFeatures(
        counts=keep.sum(-1).numpy().astype(np.uint16),
        ids=top.indices[keep].numpy().astype(np.uint32),
        logits=top.values[keep].float().numpy(),
        lse=logits_TV.double().logsumexp(-1).float().numpy(),
        label_logprob=label,
        entropy=-(logprob_TV.exp() * logprob_TV).sum(-1).float().numpy(),
    )


def hidden_of(hidden_TD: torch.Tensor, spec: HiddenSpec) -> HiddenFeatures:
    if spec.dtype == "bf16":
        bits = hidden_TD.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return HiddenFeatures(values=bits, scale=None, dtype="bf16")
    assert spec.dtype == "f32"
    return HiddenFeatures(values=hidden_TD.float().contiguous().numpy(), scale=None, dtype="f32")
