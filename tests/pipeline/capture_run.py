"""Capture samples in vLLM and keep the features as .npz: `python -m tests.pipeline.capture_run TEACHER
SAMPLES.json FOLDER RUNS.json`; the runs are {name: [step tokens, order's seed, processes]}. A program of its
own, with the engines inside it one after another.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.format.schema import (
    GroupFeatures,
    HiddenFeatures,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseFeatures,
    LseSpec,
)
from pipeline.engines.base import EngineConfig
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.teacher.checkpoint import Teacher, load_teacher
from tests.pipeline import inside

# Layer 3 is the last of the three that the teacher has.
GROUPS = (
    LogitsSpec(12, 0.7, 16, seed=5),
    LseSpec(2.0),
    LseSpec(0.7),
    HiddenSpec(0, "f32"),
    HiddenSpec(1, "f32"),
    HiddenSpec(3, "f32"),
)


def main() -> None:
    directory, samples, folder, runs = sys.argv[1:]
    inside.prepare()
    teacher = load_teacher(directory)
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in json.loads(Path(samples).read_text())]
    for name, (step, seed, processes) in json.loads(Path(runs).read_text()).items():
        np.savez(Path(folder) / f"{name}.npz", **capture(teacher, prompts, step, seed, processes))
        inside.clean_up()


def capture(
    teacher: Teacher, prompts: list[np.ndarray], step: int, seed: int, processes: int
) -> dict[str, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(prompts)) if seed else range(len(prompts))
    if processes > 1:
        # vLLM would give each process a NUMA node, of which a small machine has one.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(processes)
        )
        inside.fork_workers()
    engine = VllmEngine(
        EngineConfig(
            model=teacher.path,
            architecture=teacher.architecture,
            groups=GROUPS,
            dtype="float32",
            max_seq_len=max(map(len, prompts)),
            vocab_size=teacher.vocab_size,
            hidden_size=teacher.hidden_size,
            num_layers=teacher.num_layers,
            max_num_batched_tokens=step,
            tensor_parallel_size=processes,
        )
    )
    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if asked is not None:
        assert set(engine._llm.call(lambda llm: llm.collective_rpc(_runner))) == {f"V{1 + int(asked)}"}
    arrays = {}
    for place, captured in zip(order, engine.capture([prompts[i] for i in order]), strict=True):
        for group, features in captured.items():
            arrays |= {f"{place}.{name}": array for name, array in _arrays(group.kind, features).items()}
    engine.close()
    return arrays


def _arrays(kind: str, features: GroupFeatures) -> dict[str, np.ndarray]:
    if isinstance(features, LogitsFeatures):
        assert features.tail_ids is not None
        names = ("counts", "ids", "logits", "lse", "label_logprob", "entropy", "tail_ids")
        return {name: getattr(features, name) for name in names}
    if isinstance(features, LseFeatures):
        return {kind: features.lse}
    assert isinstance(features, HiddenFeatures)
    return {kind: features.values}


def _runner(worker: Any) -> str:
    """In a worker: which of vLLM's two model runners it has."""
    v1 = type(worker.model_runner).__module__.endswith("_model_runner")
    return "V1" if v1 else "V2"


if __name__ == "__main__":
    main()
