"""What capturing costs beside the teacher's own prefill, on one thread of a CPU (on a GPU: `make gpu-check`).

Every path runs the same samples of the demo text in a process of its own, one after the other, after a
warm-up; engine start is not counted. All compute in what `--dtype auto` chooses: the model's own bfloat16, or
float32 where that is faster. Processors without AVX-512, and those with it on which float32 is faster, have
results of their own. (b) is
(a) plus the LM head alone, the matrix product over all positions: no logits can be had for less. Ours ends
with everything encoded, hashed, synced and committed in a store on disk. (f) ends with numpy arrays. (g) is
(f) plus DistillKit's compression, at the rate of one thread measured with its own code (2,300 tokens/s,
k=50): computed, not run here.

ONLY=a,head,i runs some of the paths: these three give the default request beside its floor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from capturing import (
    Prompts,
    Workload,
    head_product,
    ours,
    settled,
    step_tokens,
    text_prompts,
    vllm_generate,
)
from common import ROOT, RUN, table, write_result

LENGTH = 512
SAMPLES = int(os.environ.get("SAMPLES", "32"))
WARM_UP = 4
DISTILLKIT_RATE = 2300.0
# One thread for the model; what drives it and writes has the rest of the machine, in every path.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
# Set where a larger processor is to compute as one without AVX-512 (docs/operations.md).
GUISE = os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2"
TWO_LAYERS = {"hidden_layers": (10, 20), "hidden_dtype": "int8"}


def workload() -> Workload:
    """Text of the demo for the demo teacher, full samples of LENGTH tokens."""
    teacher, text = RUN / "teacher", RUN / "topics.jsonl"
    return Workload(
        teacher=teacher,
        prompts=text_prompts(teacher, text, SAMPLES, LENGTH),
        warm_up=text_prompts(teacher, text, WARM_UP, LENGTH, skip=SAMPLES),
    )


def captured(**request: Any) -> float:
    """Ours, in small shards."""
    work = workload()
    given = {"shard_tokens": 4096, **request}
    wanted = settled(work, **given)[1]
    print(f"{wanted.dtype}, steps of {step_tokens(wanted):,} positions", file=sys.stderr)
    return ours(work, **given)


def transformers_topk() -> float:
    """One sample after the other in plain transformers, the top 64 of its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    work = workload()
    dtype = getattr(torch, settled(work)[1].dtype)
    model = AutoModelForCausalLM.from_pretrained(work.teacher, dtype=dtype).eval()

    @torch.inference_mode()
    def run(given: Prompts) -> None:
        for tokens in given:
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0]
            torch.topk(logits, 64)

    return work.timed(run)


PATHS: dict[str, Callable[[], float]] = {
    "a": lambda: vllm_generate(workload()),
    "head": lambda: head_product(workload()),
    "c": lambda: captured(top_k=64, **TWO_LAYERS),
    "d": lambda: captured(temperatures=(0.5, 2.0, 4.0), **TWO_LAYERS),
    "i": captured,
    "e": lambda: captured(top_k=0, **TWO_LAYERS),
    "f": lambda: vllm_generate(workload(), prompt_logprobs=64, flat_logprobs=True),
    "h": transformers_topk,
}
NAMES = {
    "a": "(a) vLLM prefill alone",
    "b": "(b) floor for logits: (a) + the bare LM-head product",
    "c": "(c) ours: k=64, lse, label, entropy, 2 layers int8, committed",
    "d": "(d) ours: default head + 16 draws, 3 temperatures, 2 layers int8, committed",
    "e": "(e) ours: 2 layers int8 alone, committed",
    "i": "(i) ours: the default spec, committed",
    "f": "(f) vLLM prompt_logprobs=64 to arrays",
    "g": "(g) (f) + DistillKit's compression (computed)",
    "h": "(h) transformers forward + topk",
}


def measure(path: str) -> float:
    """Seconds of one path, in a process of its own."""
    environment = {**os.environ, **ONE_THREAD, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, path]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    rounds = int(os.environ.get("ROUNDS", "2"))
    chosen = os.environ.get("ONLY", ",".join(PATHS)).split(",")
    best: dict[str, float] = {}
    for number in range(rounds):
        for path in chosen:
            seconds = measure(path)
            best[path] = min(seconds, best.get(path, seconds))
            print(f"round {number + 1}, {path}: {seconds:.2f} s", flush=True)
    write(best, rounds)


def write(best: dict[str, float], rounds: int) -> None:
    """The results of `best`, seconds by path, of which a, head and i are needed."""
    tokens = SAMPLES * LENGTH
    rate = {name: tokens / seconds for name, seconds in best.items()}
    rate["b"] = tokens / (best["a"] + best["head"])
    if "f" in rate:
        rate["g"] = 1 / (1 / rate["f"] + 1 / DISTILLKIT_RATE)
    lines = [
        [NAMES[n], f"{rate[n]:,.0f}", f"{rate[n] / rate['a']:.2f}", f"{rate[n] / rate['b']:.2f}"]
        for n in sorted(NAMES.keys() & rate.keys())
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    head = f"The LM head alone: {1e6 * best['head'] / tokens:.0f} µs per position. "
    note = head + f"{tokens:,} tokens in samples of {LENGTH}; the best of {rounds} rounds of each. "
    request = settled(workload())[1]
    positions = step_tokens(request)
    seconds = positions / rate["i"]
    note += f"All in {request.dtype}; a step of (i) has {positions:,} positions and takes {seconds:.1f} s."
    body = table(["", "tokens/s", "of (a)", "of (b)"], lines)
    slow = "" if request.dtype == "bfloat16" else "_float32"
    kind = slow if "avx512f" in Path("/proc/cpuinfo").read_text() and not GUISE else "_avx2"
    settings = "".join(f"{name}={os.environ[name]} " for name in ("ONLY", "ROUNDS") if name in os.environ)
    command = f"{settings}python benchmarks/capture_speed.py"
    text = f"{intro}\n\n{note}\n\n{body}"
    write_result(f"capture_speed{kind}", "Capture beside prefill", text, command)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(PATHS[sys.argv[1]]())
    else:
        main()
