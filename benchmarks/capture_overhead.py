"""What the pipeline itself costs per token, with teachers that cost nothing.

`ready`: an engine that yields packed rows at once, so that the driver and the encoders are all that works.
The rows have the statistics of text: 8 entries of a head in the mean, 44 bytes per token on disk. CPU time is
that of each thread's clock: of the driver (the main thread), of the encoding threads, and of the committing
one and zarr-python's. Stores lie in memory (/dev/shm): the fsyncs of a disk are waited for, and take no CPU.

`vllm`: real vLLM on the CPU, one layer of 64 channels and a vocabulary of 151,936, all in one process. The
driver is the main thread without the model's steps, which are timed apart; vLLM's scheduler is in it.

"By arithmetic": as if threads waited neither for Python's lock nor for one another, which they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, table, write_result

VOCAB, HIDDEN, LENGTH, SHARD = 151_936, 4096, 512, 32_768
CASES = (("default", 16), ("hidden", 4))
# Of `shard default` and `shard hidden` at commit 4b5842b and after it, in the same hour on a busy machine.
SHARDS = """One shard by itself (`capture_overhead.py shard default`, `shard hidden`), CPU in µs per token:

| columns | unpack before | now | encode, write and commit before | now |
| --- | --- | --- | --- | --- |
| default | 0.4 | 0.2 | 15.4 | 8.1 |
| hidden | 3.5 | 0.8 | 43.8 | 26.0 |

Before, zarr-python wrote the shards; their bytes are the same."""


def head_rows(rng: np.random.Generator, count: int, k: int, draws: int) -> dict[str, np.ndarray]:
    """Fields of `count` rows of the default head: ids as frequent as words are, heads up to a mass of 0.7."""
    words = np.random.default_rng(0).permutation(VOCAB)

    def ranks(*shape: int) -> np.ndarray:
        return np.minimum(np.exp(rng.random(shape) * np.log(VOCAB)).astype(np.int64), VOCAB - 1)

    # Distinct in each row: the first k of more ranks, moved apart.
    apart = np.sort(ranks(count, k), axis=1)
    for place in range(1, k):
        apart[:, place] = np.maximum(apart[:, place], apart[:, place - 1] + 1)
    apart = rng.permuted(np.minimum(apart, VOCAB - k + np.arange(k)), axis=1)
    steps = rng.exponential(1.0, (count, k)) * rng.gamma(1.5, 0.8, (count, 1)) / np.maximum(np.arange(k), 1)
    steps[:, 0] = 0
    logits = (18 - np.cumsum(steps, axis=1) + rng.normal(0, 2, (count, 1))).astype(np.float32)
    rest = rng.beta(1.2, 4, count)
    lse = (np.log(np.exp(logits.astype(np.float64)).sum(1)) - np.log1p(-rest)).astype(np.float32)
    mass = np.exp(logits - lse[:, None])
    tail = ranks(count, draws)
    while (inside := (tail[:, :, None] == apart[:, None, :]).any(2)).any():
        tail[inside] = rng.integers(0, VOCAB, inside.sum())
    return {
        "counts": np.maximum((np.cumsum(mass, 1) - mass < 0.7).sum(1), 1).astype(np.int32),
        "head_ids": words[apart].astype(np.int32),
        "head_logits": logits,
        "lse": lse,
        "label_logprob": -rng.exponential(2.5, count).astype(np.float32),
        "entropy": rng.gamma(2, 1.2, count).astype(np.float32),
        "tail_draws": np.sort(words[tail], axis=1).astype(np.int32),
    }


def groups_of(case: str) -> tuple[Any, ...]:
    from featurestore.format.schema import HiddenSpec, LogitsSpec

    hidden = (HiddenSpec(1, "int8"), HiddenSpec(2, "int8")) if case == "hidden" else ()
    return (LogitsSpec(12, 0.7, 16), *hidden)


class Ready:
    """An engine whose packed rows are there already; a copy is made of each, as vLLM's messages are."""

    def __init__(self, groups: tuple[Any, ...]) -> None:
        from pipeline.capture.packing import RowLayout
        from pipeline.capture.spec import CaptureSpec

        self.groups = groups
        self.layout = RowLayout.of(CaptureSpec.from_groups(groups, VOCAB), HIDDEN)
        rng, count = np.random.default_rng(1), SHARD
        fields = head_rows(rng, count, groups[0].top_k, groups[0].tail)
        packed = np.zeros((count, self.layout.size), np.uint8)
        for field in self.layout.fields:
            stop = field.start + field.dtype.itemsize * field.width
            if field.name.startswith("hidden"):
                packed[:, field.start : stop] = rng.integers(0, 256, (count, field.width), np.uint8)
            else:
                values = fields.get(field.name, np.ones(count, field.dtype))
                packed[:, field.start : stop] = values.reshape(count, field.width).view(np.uint8)
        label = next(field for field in self.layout.fields if field.name == "label_logprob")
        nan = np.array([np.nan], np.float32).view(np.uint8)
        packed[LENGTH - 1 :: LENGTH, label.start : label.start + 4] = nan
        self.samples = packed.reshape(-1, LENGTH, self.layout.size)

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[Any]:
        from pipeline.capture.packing import PackedFeatures

        for place in range(len(prompts)):
            rows = self.samples[place % len(self.samples)].copy()
            yield PackedFeatures(rows, self.layout, self.groups)

    def close(self) -> None: ...


def identity(hidden_size: int, layers: int) -> Any:
    from featurestore.format.schema import TeacherIdentity

    words = dict.fromkeys(("digest", "tokenizer_digest"), "0" * 32)
    words |= {"name": "none", "architecture": "none", "engine": "none", "engine_version": "0"}
    words |= {"dtype": "float32", "quantization": "none"}
    numbers = {"vocab_size": VOCAB, "hidden_size": hidden_size, "num_layers": layers, "max_position": 4096}
    return TeacherIdentity(**words, **numbers)


class Clocks:
    """CPU seconds of this process's threads, by name, between the start and `read`."""

    def __enter__(self) -> Clocks:
        self._before = {thread.ident: _cpu(thread) for thread in threading.enumerate()}
        self._stop, self.last = threading.Event(), dict[int, tuple[str, float]]()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self._note()

    def _note(self) -> None:
        """Threads of a pool are gone when it ends: their clocks are read while they run."""
        for thread in threading.enumerate():
            if thread.ident is not None and thread is not self._watch:
                self.last[thread.ident] = (thread.name, _cpu(thread) - self._before.get(thread.ident, 0.0))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()
        self._note()

    def of(self, *names: str) -> float:
        return sum(spent for name, spent in self.last.values() if name.startswith(names))


def _cpu(thread: threading.Thread) -> float:
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:
        return 0.0


def capture(store: Any, engine: Any, groups: tuple[Any, ...], tokens: int, encoders: int) -> dict[str, float]:
    """The pipeline's own code from samples to committed shards: µs per token of its threads, tokens/s."""
    from rich.console import Console

    from featurestore.format.plan import plan_generation
    from featurestore.format.records import RunCost
    from featurestore.format.schema import Sample
    from pipeline.generate.capturing import capture_tasks
    from pipeline.generate.committer import Committer
    from pipeline.progress import ConsoleReporter

    rng, report = np.random.default_rng(2), ConsoleReporter(Console(quiet=True))
    texts = rng.integers(0, VOCAB, (tokens // LENGTH, LENGTH), np.int32)
    samples = {one.id: one for one in (Sample(text, np.ones(LENGTH, np.bool_)) for text in texts)}
    plan = plan_generation(
        known_tasks={},
        committed={},
        committed_specs={},
        wanted=[(name, LENGTH) for name in samples],
        groups=groups,
        shard_tokens=SHARD,
    )
    store.add_plan(plan.new_tasks)
    shards = [(work, [samples[name] for name in work.task.sample_ids]) for work in plan.work]
    began = time.perf_counter()
    with Clocks() as clocks, Committer(store, report, 0, tokens, RunCost(id="0" * 16), encoders) as committer:
        capture_tasks(store, engine, shards, committer, report)
        clocks._note()
    seconds = time.perf_counter() - began
    return {
        "driver": 1e6 * clocks.of("MainThread", "vllm-feed") / tokens,
        "encode": 1e6 * clocks.of("encode") / tokens,
        "commit": 1e6 * clocks.of("commit", "zarr") / tokens,
        "rate": tokens / seconds,
    }


def ready(case: str, cores: int, encoders: int) -> dict[str, float]:
    from featurestore.store import FeatureStore

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    engine, tokens = Ready(groups_of(case)), dict(CASES)[case] * SHARD
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        warm = FeatureStore.create(Path(folder) / "warm", identity(HIDDEN, 2))
        capture(warm, engine, engine.groups, SHARD, encoders)
        store = FeatureStore.create(Path(folder) / "store", identity(HIDDEN, 2))
        return capture(store, engine, engine.groups, tokens, encoders)


def shard(case: str) -> dict[str, float]:
    """CPU µs per token of unpacking one shard and of `write_bundle`; runs on older checkouts, too."""
    from featurestore.format.plan import Task
    from featurestore.format.schema import Sample
    from featurestore.store import FeatureStore
    from pipeline.capture.packing import to_features

    engine = Ready(groups_of(case))
    texts = np.random.default_rng(2).integers(0, VOCAB, (SHARD // LENGTH, LENGTH), np.int32)
    samples = [Sample(text, np.ones(LENGTH, np.bool_)) for text in texts]
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            store = FeatureStore.create(Path(folder) / "store", identity(HIDDEN, 2))
            task = Task(tuple(one.id for one in samples), (LENGTH,) * len(samples))
            store.add_plan([task])
            began = time.process_time()
            made = [to_features(engine.layout.unpack(rows), engine.groups) for rows in engine.samples]
            unpacked = time.process_time()
            store.write_bundle(
                task, samples, {group: [one[group] for one in made] for group in engine.groups}
            )
            times.append((unpacked - began, time.process_time() - unpacked))
    unpacking, writing = (1e6 * min(part) / SHARD for part in zip(*times, strict=True))
    return {"unpack": unpacking, "write": writing}


def vllm(tokens: int = 8192) -> dict[str, float]:
    """The driver is what the main thread does but for the model's own steps."""
    from featurestore.store import FeatureStore
    from pipeline.engines.base import EngineConfig
    from pipeline.engines.vllm_engine import VllmEngine
    from tests import teachers

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    groups = groups_of("default")
    with tempfile.TemporaryDirectory() as folder:
        teacher = teachers.llama(Path(folder) / "teacher", vocab_size=VOCAB, layers=1, positions=LENGTH)
        engine = VllmEngine(
            EngineConfig(
                model=teacher,
                architecture="LlamaForCausalLM",
                groups=groups,
                dtype="float32",
                max_seq_len=LENGTH,
                vocab_size=VOCAB,
                hidden_size=64,
                num_layers=1,
                max_num_batched_tokens=2048,
            )
        )
        spent = [0.0]
        executor = engine._llm.call(lambda llm: llm.llm_engine.model_executor)
        for name in ("execute_model", "sample_tokens"):
            setattr(executor, name, timed(getattr(executor, name), spent))
        store = FeatureStore.create(Path(folder) / "store", identity(64, 1))
        found = capture(store, engine, groups, tokens, 1)
        engine.close()
    model = 1e6 * spent[0] / tokens
    return {**found, "driver": found["driver"] - model, "model": model}


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The same function, whose CPU time in this thread is added up."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.thread_time() - began

    return call


def apart(*words: object) -> dict[str, float]:
    """One case in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    lines, by_case = [], {}
    for case, _ in CASES:
        for cores, encoders in ((1, 1), (2, 1), (2, 2)):
            found = by_case[case] = apart("ready", case, cores, encoders)
            parts = [f"{found[part]:.1f}" for part in ("driver", "encode", "commit")]
            lines.append([case, f"{cores}", f"{encoders}", *parts, f"{found['rate']:,.0f}"])
    for case, found in by_case.items():
        encoders = 4
        bound = min(encoders / found["encode"], 1 / found["driver"], 1 / found["commit"])
        lines.append([case, "8, by arithmetic", f"{encoders}", "", "", "", f"{1e6 * bound:,.0f}"])
    body = table(
        ["columns", "cores", "encoders", "driver", "encoders' CPU", "commit", "tokens/s"],
        lines,
    )
    found = apart("vllm")
    what = "CPU in µs per token. *hidden*: with two int8 layers of 4,096 channels, 8.4 KB per token."
    real = (
        f"Real vLLM, default columns: the driver takes {found['driver']:.1f} µs per token, the encoder "
        f"{found['encode']:.1f}, committing {found['commit']:.1f}; this teacher made {found['rate']:,.0f} "
        "tokens/s."
    )
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    write_result(
        "capture_overhead", "What the pipeline costs per token", f"{intro}\n\n{what}\n\n{body}\n\n{real}"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["ready"]:
        print(json.dumps(ready(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    elif sys.argv[1:2] == ["shard"]:
        print(json.dumps(shard(sys.argv[2])))
    elif sys.argv[1:2] == ["vllm"]:
        print(json.dumps(vllm()))
    else:
        main()
