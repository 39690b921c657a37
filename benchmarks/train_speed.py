"""What a training step costs from the cache, beside the same step on labels alone and with a live teacher.

One student, 12 layers of the demo teacher's width from random weights, with AdamW, the same batches of 2
samples of 512 tokens. It trains in bfloat16 autocast, or in float32 where PRECISION=float32 is in the
environment; float32, and processors without AVX-512 or told to behave like one, have pages of their own.
Every row runs in a process of its own, which also gives its peak of resident memory; rounds of all rows
alternate, and the best step of each row counts. Ratios are of the processor's time, all threads together,
which other work on the machine disturbs least; the duration of a step stands beside it. "labels" is the loss
of transformers' own model. Reading and decoding the features is part of the step. All rows read one cache:
the default distribution, one hidden layer and the final state, both in int8; "dense reconstruction" learns
the KL over the whole vocabulary from that state and the teacher's head.

Its fourth product with a matrix of V x D is 13 % of the products of the labels' step. Cheaper ones for the
teacher's side bend the target more than the stored state does (mean KL from the exact distribution, 400
positions of the demo text): the head in its best r of 576 directions costs 1.7e-2 nats at r = 432 and 1.0e-3
at r = 560, head and states in int8 1.1e-2, the head alone in int8 1.4e-3. None is used.

The last table is the loss alone at a vocabulary of 262,144 and 2,048 positions (D=256): what the peak rises
by, against full float32 logits and their log-softmax, as a plain implementation holds them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, RUN, generate, table, write_result
from steps import Step, cached, labels, sparse_targets, student
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from featurestore.reader import CacheReader
from student.data.batches import CachedDataset, Collator
from student.losses.lm_head import HeadTransform
from student.losses.sparse import forward_kl
from student.losses.sparse_pass import sparse_head_loss
from student.objective.terms import Objective, Term, term

BATCH, STEPS, ROUNDS = 2, int(os.environ.get("STEPS", "6")), int(os.environ.get("ROUNDS", "3"))
PRECISION = os.environ.get("PRECISION", "bf16")  # or float32
GUISE = os.environ.get("ATEN_CPU_CAPABILITY", "")
CACHE, LENGTH = RUN / "speed-cache", 512
DEPTH, STUDENT_DEPTH, LAYER = 30, 12, 15  # the demo teacher's layers, the student's, and the one to compare
POSITIONS, VOCAB, WIDTH = 2048, 262_144, 256

LABELS, KL = "labels (transformers' own loss)", "cache: forward KL"
HIDDEN = f"cache: forward KL, hidden layer {LAYER}"
DENSE = "cache: dense reconstruction"


def prepare() -> None:
    """The cache: as many samples as a row takes, each of LENGTH tokens."""
    flags = ["--pack", "--max-seq-len", LENGTH, "--num-samples", BATCH * (STEPS + 1)]
    generate(CACHE, *flags, "--final", "--hidden-layers", LAYER, "--hidden-dtype", "int8")


def live(model: Any) -> Step:
    """Full-distribution KL against a teacher in the loop."""
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=dtype).eval()

    def step(batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits.float().log_softmax(-1)
        own = model(input_ids=batch["input_ids"]).logits.float().log_softmax(-1)
        return functional.kl_div(own, wanted, log_target=True, reduction="sum") / batch["labels"].numel()

    return step


def paths() -> dict[str, tuple[Callable[[Any], Step], tuple[Term, ...]]]:
    """Row -> (how its step is made, terms whose features it reads)."""
    kl = (term("kl"),)
    both = (*kl, term("hidden_cosine", pair=(LAYER, STUDENT_DEPTH // 2)))
    full = (term("full_kl", pair=(DEPTH, STUDENT_DEPTH)),)
    return {
        LABELS: (labels, ()),
        "labels (ours)": (cached(CACHE, term("ce")), (term("ce"),)),
        KL: (cached(CACHE, *kl), kl),
        HIDDEN: (cached(CACHE, *both), both),
        DENSE: (cached(CACHE, *full), full),
        "live teacher: forward KL over all of V": (live, ()),
    }


def measure_step(name: str) -> dict[str, float]:
    """Seconds of the best step, those of its processor, and the peak of resident memory in MiB."""
    make, terms = paths()[name]
    reader = CacheReader.open(CACHE)
    groups = [reader.find(kind) for kind in sorted(Objective.of(terms).needs())]
    data = CachedDataset(reader, range(len(reader)), groups)
    assert (reader.lengths == LENGTH).all()
    collate = Collator(groups, 0)
    model = student(RUN / "teacher", STUDENT_DEPTH)
    step, optimizer = make(model), torch.optim.AdamW(model.parameters(), 1e-4)
    best = {"seconds": float("inf"), "processor": float("inf")}
    for number in range(STEPS + 1):
        began, busy = time.perf_counter(), time.process_time()
        batch = collate([data[BATCH * number + i] for i in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            loss = step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:
            best["seconds"] = min(best["seconds"], time.perf_counter() - began)
            best["processor"] = min(best["processor"], time.process_time() - busy)
    return {**best, "peak": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_loss(name: str) -> dict[str, float]:
    """Seconds of loss and gradients, and what they raise the peak of resident memory by, in MiB."""
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) / WIDTH**0.5)
    label = torch.randint(VOCAB, (POSITIONS,))
    targets = sparse_targets(label, VOCAB)
    weight.grad = torch.zeros_like(weight)  # as in training: the head's gradient is there anyway
    before, began = peak_mib(), time.perf_counter()
    if name == "plain":
        logprob = functional.linear(hidden, weight).log_softmax(-1)
        wanted = torch.randn(1, VOCAB).softmax(-1)
        loss = -(wanted * logprob).sum()
    else:
        loss = sparse_head_loss(
            hidden_ND=hidden,
            weight_VD=weight,
            bias_V=None,
            targets=targets,
            terms=[(forward_kl, 1.0)],
            transform=HeadTransform(),
        ).total
    loss.backward()
    return {"seconds": time.perf_counter() - began, "peak": peak_mib() - before}


def measure(kind: str, name: str) -> dict[str, float]:
    """One row, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, kind, name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def claims(steps: dict[str, dict[str, float]], losses: dict[str, dict[str, float]]) -> str:
    """What was promised beside what was measured."""
    base, plain = steps[LABELS], losses["plain"]
    wanted = [
        *(
            (f"step, {name}", steps[name]["processor"] / base["processor"], most)
            for name, most in ((KL, 1.05), (HIDDEN, 1.10), (DENSE, 1.10))
        ),
        *((f"peak memory, {name}", steps[name]["peak"] / base["peak"], 1.02) for name in (KL, HIDDEN, DENSE)),
        ("peak memory of the loss alone, of plain", losses["ours"]["peak"] / plain["peak"], 0.15),
    ]
    rows = [
        [what, f"{found:.3f}", f"≤ {most:.2f}", "yes" if found <= most else "no"]
        for what, found, most in wanted
    ]
    return table(["", "measured", "promised", "kept"], rows)


def main() -> None:
    prepare()
    best: dict[str, dict[str, float]] = {}
    for number in range(ROUNDS):
        for name in paths():
            found = measure("step", name)
            print(f"round {number + 1}, {name}: {found}", flush=True)
            best[name] = {k: min(v, best.get(name, found)[k]) for k, v in found.items()}
    base = best[LABELS]
    rows = [
        [
            name,
            f"{one['seconds']:.2f} s",
            f"{one['processor']:.2f} s",
            f"{one['processor'] / base['processor']:.3f}",
            f"{one['peak']:,.0f} MiB",
            f"{one['peak'] / base['peak']:.3f}",
        ]
        for name, one in best.items()
    ]
    steps = table(["", "step", "processor", "of labels", "peak memory", "of labels"], rows)
    losses = {name: measure("loss", name) for name in ("plain", "ours")}
    rows = [
        [
            name,
            f"{one['peak']:,.0f} MiB",
            f"{one['peak'] / losses['plain']['peak']:.3f}",
            f"{one['seconds']:.1f} s",
        ]
        for name, one in losses.items()
    ]
    alone = table(["", "rise of the peak", "of plain", "loss and gradients"], rows)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = "\n\n".join([intro, claims(best, losses), steps, alone])
    kind = "" if PRECISION == "bf16" else f"_{PRECISION}"
    if GUISE or "avx512f" not in Path("/proc/cpuinfo").read_text():
        kind += "_avx2"
    names = ("PRECISION", "ATEN_CPU_CAPABILITY", "STEPS", "ROUNDS")
    settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    command = " ".join([*settings, "python benchmarks/train_speed.py"])
    write_result(f"train_speed{kind}", "What a training step costs", body, command)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"step": measure_step, "loss": measure_loss}[sys.argv[1]](sys.argv[2])))
    else:
        main()
