"""Capture samples in vLLM and keep the features as .npz: `python -m tests.pipeline.capture_run TEACHER
SAMPLES.json OUT.npz STEP_TOKENS ORDER_SEED PROCESSES`. A program of its own, because a process has
one engine in its life.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from featurestore.schema import HiddenSpec, LogitsFeatures, LogitsSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.vllm_engine import VllmEngine
from pipeline.teacher import load_teacher

LOGITS, HIDDEN = LogitsSpec(12, 0.7, 16, seed=5), HiddenSpec(1, "f32")


def main() -> None:
    directory, samples, out, step, seed, processes = sys.argv[1:]
    teacher = load_teacher(directory)
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in json.loads(Path(samples).read_text())]
    order = np.random.default_rng(int(seed)).permutation(len(prompts)) if int(seed) else range(len(prompts))
    if int(processes) > 1:
        # vLLM would give each process a NUMA node, of which a small machine has one.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(int(processes))
        )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
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
            max_num_batched_tokens=int(step),
            tensor_parallel_size=int(processes),
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
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
