"""What a ternary training step costs on a CPU beside a full-precision one.

Students of the demo teacher's shape (30 layers of 576/1536, random weights, embeddings and head frozen) train
in float32 on samples of 256 tokens: body, a squared-error loss on its last states, backward pass, clipping of
gradients, fused AdamW, quantisation of the changed weights. LM head and reading the cache are not in it: they
cost all rows the same. Ternary students have `--bitnet-conversion subln`; "warm-up" is a step with both λ at
a half, "ternary" one with both at 1.

All rows run in one go: each tree of code has a process of its own, and rows take turns, a step each. What
counts is the least processor time of a row's steps, all threads together, which other work on the machine
disturbs least; the least duration stands beside it. "before" is another checkout, whose folder BEFORE names,
here commit 3cf119e. "log" is what the trainer measures of the weights whenever it logs, which is no part of
the step's time.

Tried for a matrix of 1,536 x 576 and 256 tokens, one thread, and not taken since it is no faster: rounding
the weight in parts of 8,192 to 131,072 values (2.4 to 1.4 ms; at once 1.5) or by comparisons with thresholds
(4.3 to 2.8 ms), its mean as an L1 norm (0.75 ms and other bits; 0.55), rounding activations in parts (0.23 to
0.16 ms; at once 0.12). torch._int_mm takes a quarter of the time of a float32 product on the processor with
VNNI (0.8 and 3.3 ms). It is not used where oneDNN is held to AVX2, as little as on a processor without VNNI.

With MALLOC_TRIM_THRESHOLD_=2000000000, MALLOC_MMAP_THRESHOLD_=33554432 and MALLOC_TOP_PAD_=67108864 in the
environment, glibc keeps freed memory, and the pages of gradients need not be cleared anew in each step: in
one trial with 6 layers, a step took 0.365 s instead of 0.386 in full precision, 0.432 instead of 0.460 when
ternary, and 0.556 instead of 0.550 in the warm-up.

    BEFORE=../old python benchmarks/ternary_speed.py
    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 BEFORE=… python …
    python benchmarks/ternary_speed.py page                 the page of all that have run

Needs the teacher of `run/` only, and 10 GB of memory; goes on where it was stopped. LAYERS, ROUNDS and
SAMPLES are for trials.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, RUN, table, write_result
from steps import student

from student import bitnet

LAYERS, ROUNDS = int(os.environ.get("LAYERS", "30")), int(os.environ.get("ROUNDS", "4"))
SAMPLES = [int(one) for one in os.environ.get("SAMPLES", "1,4").split(",")]
LENGTH, THREADS = 256, (1, 2)
WORK = RUN / "ternary_speed"
GUISE = os.environ.get("ATEN_CPU_CAPABILITY", "")
FP, WARM, TERNARY = "full precision", "warm-up", "ternary"
STRENGTHS = {WARM: bitnet.Strengths(0.5, 0.5, 1.0), TERNARY: bitnet.FULL}
PHASES = ("forward", "backward", "clipping", "optimizer", "quantisation", "log")


class Trainee:
    """A student and what a step needs of it."""

    def __init__(self, ternary: bool) -> None:
        self.model = student(RUN / "teacher", LAYERS)
        if ternary:
            bitnet.convert_student(self.model, "subln")
        self.body = self.model.get_decoder()
        self.body.embed_tokens.weight.requires_grad_(False)
        learned = [one for one in self.body.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, 1e-4, fused=True)
        self.ternary = ternary
        self.quantise()
        self.meter = bitnet.FlipMeter(self.model) if ternary else None

    def quantise(self) -> None:
        """As the trainer does after each step; here at once, to be timed."""
        bitnet.quantize_once(self.model)
        for _, layer in bitnet.bit_linears(self.model):
            layer.quantized()

    def step(self, kind: str, samples: int) -> dict[str, list[float]]:
        """[processor seconds, duration] of each phase."""
        if self.ternary:
            bitnet.set_strengths(self.model, STRENGTHS[kind])
        ids_BT = torch.randint(self.model.config.vocab_size, (samples, LENGTH))
        found, last = {}, [time.process_time(), time.perf_counter()]

        def lap(phase: str) -> None:
            nonlocal last
            now = [time.process_time(), time.perf_counter()]
            found[phase] = [now[0] - last[0], now[1] - last[1]]
            last = now

        loss = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state.square().mean()
        lap("forward")
        loss.backward()
        lap("backward")
        torch.nn.utils.clip_grad_norm_(self.body.parameters(), 1.0)
        lap("clipping")
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimizer")
        self.quantise()
        lap("quantisation")
        if self.meter is not None:
            self.meter.measure()
        lap("log")
        return found


def serve(kind: str) -> None:
    """A trainee that takes a step for each line of standard input: row, threads, samples."""
    trainee = Trainee(kind == "ternary")
    print("ready", flush=True)
    for line in sys.stdin:
        row, threads, samples = json.loads(line)
        torch.set_num_threads(threads)
        print(json.dumps(trainee.step(row, samples)), flush=True)


class Server:
    """A trainee of a tree of code in a process of its own."""

    def __init__(self, kind: str, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(max(THREADS))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), "serve", kind],
            env={**environment, "PYTHONPATH": f"{tree}:{Path(__file__).parent}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "a trainee has died"
        return line

    def step(self, *what: Any) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        found: dict[str, list[float]] = json.loads(self.answer())
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def total(found: dict[str, list[float]], which: int) -> float:
    """Of a step without a log."""
    return sum(times[which] for phase, times in found.items() if phase != "log")


def measure(kept: Path) -> None:
    """The best step of each row, threads and samples, those that are not kept yet; the first round is not
    counted.
    """
    results = json.loads(kept.read_text()) if kept.is_file() else []
    known = {(one["threads"], one["samples"]) for one in results}
    settings = [setting for setting in itertools.product(THREADS, SAMPLES) if setting not in known]
    trees = {"": ROOT} | ({"before": Path(os.environ["BEFORE"]).resolve()} if "BEFORE" in os.environ else {})
    servers = {(FP, ""): Server("fp", ROOT)}
    servers |= {("ternary", tree): Server("ternary", path) for tree, path in trees.items()}
    rows = [(FP, "")] + [(row, tree) for row in (WARM, TERNARY) for tree in reversed(trees)]
    for threads, samples in settings:
        steps: dict[tuple[str, str], list[dict[str, list[float]]]] = {row: [] for row in rows}
        for number in range(ROUNDS + 1):
            for row, tree in rows:
                server = servers[FP if row == FP else "ternary", tree]
                found = server.step(row, threads, samples)
                if number:
                    steps[row, tree].append(found)
        for (row, tree), all_steps in steps.items():
            best = {
                phase: [min(one[phase][which] for one in all_steps) for which in (0, 1)] for phase in PHASES
            }
            step = [min(total(one, which) for one in all_steps) for which in (0, 1)]
            setting = {"row": row, "tree": tree, "threads": threads, "samples": samples}
            results.append({**setting, "step": step, "phases": best})
            print(results[-1], flush=True)
        kept.write_text(json.dumps(results))
    for server in servers.values():
        server.close()


def tables(results: list[dict[str, Any]]) -> str:
    """Of one kind of processor."""
    rows, phases = [], []
    for one in results:
        (base,) = (
            other
            for other in results
            if (other["row"], other["threads"], other["samples"]) == (FP, one["threads"], one["samples"])
        )
        name = ", ".join(filter(None, (one["row"], one["tree"])))
        processor, duration = one["step"]
        tokens = one["samples"] * LENGTH
        setting = [str(tokens), str(one["threads"]), name]
        rows.append(
            [
                *setting,
                f"{processor:.2f} s",
                f"{processor / base['step'][0]:.2f}",
                f"{tokens / processor:.0f}",
                f"{duration:.2f} s",
                f"{tokens / duration:.0f}",
            ]
        )
        if one["threads"] == 1:
            phases.append([*setting[::2], *(f"{one['phases'][phase][0]:.2f}" for phase in PHASES)])
    header = [
        "tokens of a step",
        "threads",
        "",
        "processor time",
        "of full precision",
        "tokens a second of it",
    ]
    return (
        table([*header, "duration", "tokens/s"], rows)
        + "\n\nProcessor seconds of each phase, one thread, each phase's least:\n\n"
        + table(["tokens of a step", "", *PHASES], phases)
    )


def page() -> None:
    """Of the guises that have run."""
    body = (__doc__ or "").split("\n", 2)[2].split("\n    BEFORE")[0].strip()
    for guise, title in (("", "This processor, as it is"), ("avx2", "As a processor with AVX2 alone")):
        kept = WORK / f"results{guise}.json"
        if kept.is_file():
            body += f"\n\n## {title}\n\n{tables(json.loads(kept.read_text()))}"
    write_result("ternary_speed", "What a ternary training step costs on a CPU", body)


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    match sys.argv[1:]:
        case ["serve", kind]:
            serve(kind)
        case ["page"]:
            page()
        case _:
            measure(WORK / f"results{GUISE}.json")
            page()


if __name__ == "__main__":
    main()
