"""Capture samples in vLLM and keep the features as .npz: `python -m tests.pipeline.capture_run TEACHER
SAMPLES.json FOLDER RUNS.json`; the runs are {name: [step tokens, order's seed, processes]}. A program of its
own, with the engines inside it one after another.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.teacher.checkpoint import Teacher, load_teacher
from tests.pipeline.engine_agreement import loaded_modules_are_no_garbage

LOGITS, HIDDEN = LogitsSpec(12, 0.7, 16, seed=5), HiddenSpec(1, "f32")


def main() -> None:
    directory, samples, folder, runs = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    loaded_modules_are_no_garbage()
    teacher = load_teacher(directory)
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in json.loads(Path(samples).read_text())]
    for name, (step, seed, processes) in json.loads(Path(runs).read_text()).items():
        np.savez(Path(folder) / f"{name}.npz", **capture(teacher, prompts, step, seed, processes))
        # What an engine inside the process leaves behind.
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


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
    engine = VllmEngine(
        EngineConfig(
            model=teacher.path,
            architecture=teacher.architecture,
            groups=(LOGITS, HIDDEN),
            dtype="float32",
            max_seq_len=max(map(len, prompts)),
            vocab_size=teacher.vocab_size,
            hidden_size=teacher.hidden_size,
            num_layers=teacher.num_layers,
            max_num_batched_tokens=step,
            tensor_parallel_size=processes,
        )
    )
    arrays = {}
    for place, captured in zip(order, engine.capture([prompts[i] for i in order]), strict=True):
        logits, hidden = captured[LOGITS], captured[HIDDEN]
        assert isinstance(logits, LogitsFeatures)
        for name in ("counts", "ids", "logits", "lse", "label_logprob", "entropy", "tail_ids"):
            arrays[f"{place}.{name}"] = getattr(logits, name)
        arrays[f"{place}.hidden"] = hidden.values
    engine.close()
    return arrays


if __name__ == "__main__":
    main()
