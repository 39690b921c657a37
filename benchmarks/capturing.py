"""The paths whose speed a capture is compared with, on one workload: a CPU's or a GPU's seconds of each."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Prompts = Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Samples of one length for a teacher, and others that go before them to warm up; int32 [T] each."""

    teacher: Path
    prompts: Prompts
    warm_up: Prompts

    @property
    def length(self) -> int:
        return len(self.prompts[0])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))

    def timed(self, run: Callable[[Prompts], object]) -> float:
        """Seconds of `run` for the samples, after the warm-up."""
        run(self.warm_up)
        synchronize()
        began = time.perf_counter()
        run(self.prompts)
        synchronize()
        return time.perf_counter() - began


def synchronize() -> None:
    """Wait for a GPU that this process computes on."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def text_prompts(teacher: Path, text: Path, count: int, length: int, skip: int = 0) -> list[np.ndarray]:
    """Full samples of `length` tokens of a text, one document a line, behind the first `skip` of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokens: list[int] = []
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            tokens += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(tokens) >= (skip + count) * length:
                break
    return list(np.array(tokens[skip * length : (skip + count) * length], np.int32).reshape(count, length))


def settled(work: Workload, **request: Any) -> tuple[Any, Any]:
    """The teacher, and a request with what `generate` would choose on this machine."""
    from pipeline.generate.sizing import settle
    from pipeline.request.generate import GenerateRequest
    from pipeline.teacher.checkpoint import load_teacher

    teacher = load_teacher(str(work.teacher))
    wanted = GenerateRequest(
        teacher=str(work.teacher), dataset="", out="", max_seq_len=work.length, **request
    )
    return teacher, settle(wanted, teacher, None)[0]


def vllm_generate(work: Workload, **sampling: Any) -> float:
    """vLLM's own generation of one token after each prompt, on a GPU with vLLM's own defaults."""
    import torch
    from vllm import LLM, SamplingParams

    teacher, request = settled(work)
    as_ours = {"max_num_batched_tokens": step_tokens(request), "enforce_eager": True}
    llm = LLM(
        model=str(work.teacher),
        max_model_len=work.length + 1,
        dtype=request.torch_dtype(teacher),
        enable_prefix_caching=False,
        max_logprobs=64,
        **({} if torch.cuda.is_available() else as_ours),
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **sampling)

    def run(given: Prompts) -> None:
        outputs = llm.generate([{"prompt_token_ids": p.tolist()} for p in given], params, use_tqdm=False)
        if "prompt_logprobs" in sampling:
            for output in outputs:
                found = output.prompt_logprobs
                np.array(found.token_ids, np.int32), np.array(found.logprobs, np.float32)

    return work.timed(run)


def head_product(work: Workload) -> float:
    """The LM head over all positions, chunk by chunk."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher, request = settled(work)
    dtype = getattr(torch, request.torch_dtype(teacher))
    model = AutoModelForCausalLM.from_pretrained(work.teacher, dtype=dtype)
    device, rows = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 512)
    weight = model.lm_head.weight.detach().to(device)
    hidden = torch.randn(work.tokens, weight.shape[1], device=device, dtype=dtype)

    def product(_given: Prompts) -> None:
        for chunk in hidden.split(rows):
            torch.nn.functional.linear(chunk, weight)

    return work.timed(product)


def step_tokens(request: Any) -> int:
    """Positions of one step of vLLM under a settled request."""
    from pipeline.engines.llm import own_step_tokens

    return request.max_num_batched_tokens or own_step_tokens(request.tensor_parallel_size)


def ours(work: Workload, **request: Any) -> float:
    """The pipeline's own code from samples to committed shards."""
    from rich.console import Console

    from featurestore.format.plan import plan_generation
    from featurestore.format.records import RunCost
    from featurestore.format.schema import Sample
    from featurestore.store import FeatureStore
    from pipeline.engines.registry import find_engine
    from pipeline.generate.capturing import capture_tasks
    from pipeline.generate.committer import Committer
    from pipeline.generate.passes import CaptureJob, start_engine
    from pipeline.generate.precision import Precision
    from pipeline.generate.sizing import encoders
    from pipeline.progress import ConsoleReporter
    from pipeline.request.teacher import identity_of

    teacher, wanted = settled(work, **request)
    identity = identity_of(wanted, teacher, find_engine(wanted.engine).version())
    report = ConsoleReporter(Console(quiet=True))
    groups = wanted.groups(teacher)

    job = CaptureJob(
        request=wanted, teacher=teacher, identity=identity, precision=Precision(dtype=wanted.dtype)
    )
    engine = start_engine(job, groups, False, report)
    with tempfile.TemporaryDirectory() as folder:

        def run(given: Prompts) -> None:
            store = FeatureStore.create(Path(folder) / f"{len(given)}", identity)
            samples = [Sample(tokens, np.ones(len(tokens), np.bool_)) for tokens in given]
            plan = plan_generation(
                known_tasks={},
                committed={},
                committed_specs={},
                wanted=[(sample.id, len(sample)) for sample in samples],
                groups=groups,
                shard_tokens=wanted.shard_size,
            )
            store.add_plan(plan.new_tasks)
            by_id = {sample.id: sample for sample in samples}
            threads = encoders(wanted.tensor_parallel_size, wanted.data_parallel)
            with Committer(store, report, 0, plan.rows_total, RunCost(id="0" * 16), threads) as committer:
                shards = [(work, [by_id[name] for name in work.task.sample_ids]) for work in plan.work]
                capture_tasks(store, engine, shards, committer, report)
            store.publish_manifest()

        seconds = work.timed(run)
    engine.close()
    return seconds
