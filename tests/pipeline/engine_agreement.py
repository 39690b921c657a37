"""Run both engines on the same samples in float32 and print their differences, one JSON line per teacher.

A program of its own, with the engines inside it one after another, which start in a few seconds each:
`python -m tests.pipeline.engine_agreement PLAN.json`; the plan is {teacher directory: [token ids, ...]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distily.vllm_plugin import DRIVER_VARIABLE
from featurestore.format.schema import (
    GroupFeatures,
    GroupSpec,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
)
from pipeline.engines.base import EngineConfig
from pipeline.engines.transformers_engine import TransformersEngine
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import load_teacher, without_padding
from pipeline.teacher.tokenizer import load_tokenizer
from tests.pipeline import inside

TOP_K = 64
Array = np.ndarray[Any, Any]


def compare(
    ours: dict[GroupSpec, GroupFeatures], theirs: dict[GroupSpec, GroupFeatures]
) -> dict[str, float | bool]:
    """The largest differences over all positions of one sample."""
    out: dict[str, float | bool] = {}
    for group, a in ours.items():
        b = theirs[group]
        if isinstance(a, LogitsFeatures) and isinstance(b, LogitsFeatures):
            ids_a, ids_b = a.ids.reshape(-1, TOP_K), b.ids.reshape(-1, TOP_K)
            out["logit"], out["beyond_ties"] = _by_id(
                ids_a, a.logits.reshape(-1, TOP_K), ids_b, b.logits.reshape(-1, TOP_K)
            )
            drawn = [ids.max() for ids in (a.tail_ids, b.tail_ids) if ids is not None]
            out["largest_id"] = int(max(a.ids.max(), b.ids.max(), *drawn))
            out["lse"] = float(np.abs(a.lse - b.lse).max())
            out["entropy"] = float(np.abs(a.entropy - b.entropy).max())
            out["label_logprob"] = float(np.abs(a.label_logprob - b.label_logprob)[:-1].max())
            out["same_draws"] = float((a.tail_ids == b.tail_ids).mean())
            out["last_label_is_nan"] = bool(np.isnan(a.label_logprob[-1]) and np.isnan(b.label_logprob[-1]))
        elif isinstance(a, LseFeatures) and isinstance(b, LseFeatures):
            out[group.kind] = float(np.abs(a.lse - b.lse).max())
        else:
            x, y = a.to_float32(), b.to_float32()
            relative = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)
            out[group.kind] = float(relative.max())
    return out


def _by_id(ids_a: Array, logits_a: Array, ids_b: Array, logits_b: Array) -> tuple[float, float]:
    """The largest difference of the logits of ids in both heads; and how far those in one head only lie above
    the other's last, which float noise lets in where two tokens nearly tie for the last rank.
    """
    difference = beyond = 0.0
    for row in range(len(ids_a)):
        one, other = (
            dict(zip(i[row], x[row], strict=True)) for i, x in ((ids_a, logits_a), (ids_b, logits_b))
        )
        difference = max([difference, *(abs(float(one[i] - other[i])) for i in one.keys() & other.keys())])
        for mine, theirs in ((one, other), (other, one)):
            last = min(theirs.values())
            beyond = max([beyond, *(float(mine[i] - last) for i in mine.keys() - theirs.keys())])
    return difference, beyond


def run(directory: str, samples: list[list[int]]) -> dict[str, Any]:
    """Both engines on one teacher: the differences of each sample, or the line that refuses it."""
    teacher = load_teacher(directory)
    teacher = without_padding(teacher, load_tokenizer(teacher))
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in samples]
    depth = teacher.num_layers
    hidden = (HiddenSpec(layer, "f32") for layer in (0, 1, depth // 2, depth - 1, depth))
    groups = (LogitsSpec(TOP_K, tail=16), LseSpec(2.0), *hidden)
    config = EngineConfig(
        model=teacher.path,
        architecture=teacher.architecture,
        groups=groups,
        dtype="float32",
        max_seq_len=max(map(len, prompts)),
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        num_layers=depth,
    )
    # First, because vLLM's own Transformers backend decorates transformers' classes for good.
    oracle = list(TransformersEngine(config).capture(prompts))
    try:
        engine = VllmEngine(config)
        assert DRIVER_VARIABLE not in os.environ, "what this program starts later would hear from us"
        captured = list(engine.capture(prompts))
    except RequestError as refusal:
        return {"architecture": teacher.architecture, "refused": str(refusal)}
    engine.close()
    report = [compare(a, b) for a, b in zip(captured, oracle, strict=True)]
    return {"architecture": teacher.architecture, "vocabulary": teacher.vocab_size, "samples": report}


def look_at_classes_here() -> None:
    """vLLM looks at each architecture's class in a fresh process, so that CUDA is not initialised in its own;
    on a CPU this one serves as well, and twenty teachers cost twenty starts of Python less.
    """
    from vllm.model_executor.models import registry

    if not torch.cuda.is_available() and hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda look: look()


def main() -> None:
    look_at_classes_here()
    inside.prepare()
    for directory, samples in json.loads(Path(sys.argv[1]).read_text()).items():
        sys.stdout.write("\n" + json.dumps({"teacher": directory} | run(directory, samples)) + "\n")
        sys.stdout.flush()
        inside.clean_up()


if __name__ == "__main__":
    main()
