"""What capturing costs beside the teacher's own prefill, on one thread of a CPU (or on a GPU).

Every path runs the same samples of the demo text in a process of its own, one after the other, after a
warm-up; engine start is not counted. All compute in what `--dtype auto` chooses: the model's own bfloat16, or
float32 where that is faster, as on processors without AVX-512, whose results have a file of their own. (b) is
(a) plus the LM head alone, the matrix product over all positions: no logits can be had for less. Ours ends
with everything encoded, hashed, synced and committed in a store on disk. (f) ends with numpy arrays. (g) is
(f) plus DistillKit's compression, at the rate of one thread measured with its own code (2,300 tokens/s,
k=50): computed, not run here.

ONLY=a,head,i runs some of the paths: these three give the default request beside its floor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def prompts(count: int, skip: int = 0) -> list[np.ndarray]:
    """Full samples of LENGTH tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RUN / "teacher")
    tokens: list[int] = []
    with (RUN / "topics.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            tokens += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(tokens) >= (skip + count) * LENGTH:
                break
    return list(np.array(tokens[skip * LENGTH : (skip + count) * LENGTH], np.int32).reshape(count, LENGTH))


def timed(run: Callable[[list[np.ndarray]], object]) -> float:
    """Seconds for the samples, after a warm-up with others."""
    run(prompts(WARM_UP, SAMPLES))
    given = prompts(SAMPLES)
    began = time.perf_counter()
    run(given)
    return time.perf_counter() - began


def settled(**request: Any) -> tuple[Any, Any]:
    """The teacher, and a request with what `generate` would choose on this machine."""
    from pipeline.generate.sizing import settle
    from pipeline.request.generate import GenerateRequest
    from pipeline.teacher.checkpoint import load_teacher

    teacher = load_teacher(str(RUN / "teacher"))
    wanted = GenerateRequest(teacher=str(RUN / "teacher"), dataset="", out="", max_seq_len=LENGTH, **request)
    return teacher, settle(wanted, teacher, None)[0]


def vllm_generate(**sampling: Any) -> float:
    """vLLM's own generation of one token after each prompt."""
    from vllm import LLM, SamplingParams

    request = settled()[1]

    llm = LLM(
        model=str(RUN / "teacher"),
        max_model_len=LENGTH + 1,
        dtype=request.dtype,
        max_num_batched_tokens=request.max_num_batched_tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=64,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **sampling)

    def run(given: list[np.ndarray]) -> None:
        outputs = llm.generate([{"prompt_token_ids": p.tolist()} for p in given], params, use_tqdm=False)
        if "prompt_logprobs" in sampling:
            for output in outputs:
                found = output.prompt_logprobs
                np.array(found.token_ids, np.int32), np.array(found.logprobs, np.float32)

    return timed(run)


def head_product() -> float:
    """The LM head over all positions, chunk by chunk."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dtype = getattr(torch, settled()[1].dtype)
    model = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=dtype)
    weight = model.lm_head.weight.detach()
    hidden = torch.randn(SAMPLES * LENGTH, weight.shape[1]).to(dtype)

    def product(_given: list[np.ndarray]) -> None:
        for chunk in hidden.split(512):
            torch.nn.functional.linear(chunk, weight)

    return timed(product)


def ours(**request: Any) -> float:
    """The pipeline's own code from samples to committed shards."""
    from rich.console import Console

    from featurestore.format.plan import plan_generation
    from featurestore.format.records import RunCost
    from featurestore.format.schema import Sample
    from featurestore.store import FeatureStore
    from pipeline.engines.registry import find_engine
    from pipeline.generate.capturing import capture_tasks
    from pipeline.generate.committer import Committer
    from pipeline.generate.precision import Precision
    from pipeline.generate.run import PreparedCapture, start_engine
    from pipeline.progress import ConsoleReporter
    from pipeline.request.teacher import identity_of

    teacher, wanted = settled(shard_tokens=4096, **request)
    print(f"{wanted.dtype}, steps of {wanted.max_num_batched_tokens:,} positions", file=sys.stderr)
    chosen = (Precision(dtype=wanted.dtype), wanted.shard_size)
    identity = identity_of(wanted, teacher, find_engine(wanted.engine).version())
    report = ConsoleReporter(Console(quiet=True))
    groups = wanted.groups(teacher)
    engine = start_engine(
        PreparedCapture(wanted, teacher, identity, {}, None, None, *chosen), groups, False, report
    )  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:

        def run(given: list[np.ndarray]) -> None:
            store = FeatureStore.create(Path(folder) / f"{len(given)}", identity)
            samples = [Sample(tokens, np.ones(len(tokens), np.bool_)) for tokens in given]
            ids = [(sample.id, LENGTH) for sample in samples]
            plan = plan_generation(
                known_tasks={},
                committed={},
                committed_specs={},
                wanted=ids,
                groups=groups,
                shard_tokens=wanted.shard_size,
            )
            store.add_plan(plan.new_tasks)
            by_id = {sample.id: sample for sample in samples}
            with Committer(store, report, 0, plan.rows_total, RunCost(id="0" * 16)) as committer:
                capture_tasks(store, engine, plan.work, by_id, committer, report)
            store.publish_manifest()

        seconds = timed(run)
    engine.close()
    return seconds


def transformers_topk() -> float:
    """One sample after the other in plain transformers, the top 64 of its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dtype = getattr(torch, settled()[1].dtype)
    model = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=dtype).eval()

    @torch.inference_mode()
    def run(given: list[np.ndarray]) -> None:
        for tokens in given:
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0]
            torch.topk(logits, 64)

    return timed(run)


PATHS: dict[str, Callable[[], float]] = {
    "a": vllm_generate,
    "head": head_product,
    "c": lambda: ours(top_k=64, **TWO_LAYERS),
    "d": lambda: ours(temperatures=(0.5, 2.0, 4.0), **TWO_LAYERS),
    "i": ours,
    "e": lambda: ours(top_k=0, **TWO_LAYERS),
    "f": lambda: vllm_generate(prompt_logprobs=64, flat_logprobs=True),
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
    request = settled()[1]
    step = request.max_num_batched_tokens / rate["i"]
    note += f"All in {request.dtype}; a step of (i) takes {step:.1f} s, "
    note += f"for {request.max_num_batched_tokens:,} positions."
    body = table(["", "tokens/s", "of (a)", "of (b)"], lines)
    without = "" if "avx512f" in Path("/proc/cpuinfo").read_text() and not GUISE else "_avx2"
    settings = "".join(f"{name}={os.environ[name]} " for name in ("ONLY", "ROUNDS") if name in os.environ)
    command = f"{settings}python benchmarks/capture_speed.py"
    text = f"{intro}\n\n{note}\n\n{body}"
    write_result(f"capture_speed{without}", "Capture beside prefill", text, command)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(PATHS[sys.argv[1]]())
    else:
        main()
