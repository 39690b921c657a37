"""Captures: what they hold beside transformers, and what they cost beside the teacher's prefill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capturing import Workload, head_product, ours, text_prompts, vllm_generate
from common import RUN

from featurestore.format.schema import GroupFeatures, GroupSpec, HiddenSpec, LogitsSpec, LseSpec
from gpu_check import rows
from gpu_check.measuring import device_peak, fresh_memory
from gpu_check.prepare import teacher_of
from gpu_check.sizes import Size
from pipeline.engines.base import EngineConfig
from pipeline.engines.transformers_engine import TransformersEngine
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.teacher.checkpoint import load_teacher, without_padding
from pipeline.teacher.tokenizer import load_tokenizer
from tests.pipeline import engine_agreement

Features = list[dict[GroupSpec, GroupFeatures]]
# vLLM may be so many times as far from float32 as transformers is, and what sums in another order cost.
_TIMES, _MORE = 2.0, 1e-3
_SPEEDS: dict[str, Callable[[Workload], float]] = {
    rows.PREFILL: vllm_generate,
    rows.HEAD_PRODUCT: head_product,
    rows.CAPTURE: ours,
}


def measure(row: str, size: Size, folder: Path) -> dict[str, Any]:
    """One row; on a CPU all engines run within this process, which spares a start of Python for each."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        engine_agreement.look_at_classes_here()
    try:
        if row == rows.AGREEMENT:
            return agreement(size, folder)
        work = workload(size, folder)
        with device_peak() as peak:
            seconds = _SPEEDS[row](work)
        return {"seconds": seconds, "tokens": work.tokens, "bytes": peak.bytes}
    finally:
        if on_cpu and row != rows.HEAD_PRODUCT:
            end_vllm()


def end_vllm() -> None:
    """So that this process can start another: vLLM would look for plug-ins only once, and ours speaks up only
    where a capture begins. What it has done to vLLM's models stays, so plain engines come first.
    """
    from vllm import plugins
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    plugins.plugins_loaded = False


def workload(size: Size, folder: Path) -> Workload:
    """Random tokens for the random teacher."""
    chance = np.random.default_rng(1)

    def prompts(count: int) -> list[np.ndarray]:
        shape = (count, size.capture_length)
        return list(chance.integers(3, size.teacher["vocab_size"], shape).astype(np.int32))

    return Workload(
        teacher=teacher_of(folder),
        prompts=prompts(size.capture_samples),
        warm_up=prompts(size.capture_warm_up),
    )


def agreement(size: Size, folder: Path) -> dict[str, Any]:
    """The largest difference of any position to transformers in float32, of vLLM's capture and of
    transformers, both in the teacher's own type.

    Heads are compared by token, so that ties may change places.
    """
    path, count, length = teacher_of(folder), size.agreement_samples, size.agreement_length
    if size.demo:
        path = RUN / "teacher"
        prompts = text_prompts(path, RUN / "topics.jsonl", count, length)
    else:
        prompts = list(workload(size, folder).prompts[:count])
    teacher = load_teacher(str(path))
    teacher = without_padding(teacher, load_tokenizer(teacher))
    hidden = (HiddenSpec(layer, "f32") for layer in (0, teacher.num_layers // 2, teacher.num_layers))
    groups = (LogitsSpec(engine_agreement.TOP_K, tail=16), LseSpec(2.0), *hidden)

    def config(dtype: str) -> EngineConfig:
        return EngineConfig(
            model=teacher.path,
            architecture=teacher.architecture,
            groups=groups,
            dtype=dtype,
            max_seq_len=max(map(len, prompts)),
            vocab_size=teacher.vocab_size,
            hidden_size=teacher.hidden_size,
            num_layers=teacher.num_layers,
        )

    exact = captured(TransformersEngine(config("float32")), prompts)
    theirs = captured(TransformersEngine(config(teacher.config_dtype)), prompts)
    own = captured(VllmEngine(config(teacher.config_dtype)), prompts)
    return judged(differences(own, exact), differences(theirs, exact)) | {
        "dtype": teacher.config_dtype,
        "positions": sum(map(len, prompts)),
        "teacher": path.name if size.demo else "random",
    }


def captured(engine: Any, prompts: list[np.ndarray]) -> Features:
    """All of it, after which the engine's memory is free again."""
    features = list(engine.capture(prompts))
    engine.close()
    fresh_memory()
    return features


def differences(features: Features, exact: Features) -> dict[str, float]:
    """The largest of all samples, by what is compared."""
    compared = [engine_agreement.compare(a, b) for a, b in zip(features, exact, strict=True)]
    names = [name for name in compared[0] if name not in ("largest_id", "same_draws", "last_label_is_nan")]
    return {name: max(float(sample[name]) for sample in compared) for name in names}


def judged(own: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Both, and whether ours are no further off than rounding accounts for."""
    agrees = all(own[name] <= _TIMES * theirs[name] + _MORE for name in own)
    return {"differences": {name: [own[name], theirs[name]] for name in own}, "agrees": agrees}
