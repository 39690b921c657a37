"""What a training step costs from the cache, beside the same step on labels alone and with a live teacher.

One student, 12 layers of the demo teacher's width from random weights, in bfloat16 autocast with AdamW, the
same batches of 2 samples of 512 tokens. Every row runs in a process of its own, which also gives its peak of
resident memory; rounds of all rows alternate, and the best step of each row counts. "labels" is the loss of
transformers' own model. Reading and decoding the features is part of the step. All rows read one cache: the
default distribution, one hidden layer and the final state, both in int8; "dense reconstruction" learns the KL
over the whole vocabulary from that state and the teacher's head.

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
from typing import Any

import torch
from common import BIN, ROOT, RUN, table, write_result
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

BATCH, STEPS, ROUNDS = 2, 6, int(os.environ.get("ROUNDS", "3"))
PRECISION = os.environ.get("PRECISION", "bf16")  # or float32
CACHE, LENGTH = RUN / "speed-cache", 512
DEPTH, STUDENT_DEPTH, LAYER = 30, 12, 15  # the demo teacher's layers, the student's, and the one to compare
POSITIONS, VOCAB, WIDTH = 2048, 262_144, 256

LABELS, KL = "labels (transformers' own loss)", "cache: forward KL"
HIDDEN = f"cache: forward KL, hidden layer {LAYER}"


def prepare() -> None:
    """The cache: as many samples as a row takes, each of LENGTH tokens."""
    command = [
        *(BIN / "distily-cache", "generate", RUN / "teacher", RUN / "topics.jsonl", "--out", CACHE),
        *("--engine", "transformers", "--pack", "--max-seq-len", str(LENGTH)),
        *("--num-samples", str(BATCH * (STEPS + 1)), "--final", "--hidden-layers", str(LAYER)),
        *("--hidden-dtype", "int8"),
    ]
    subprocess.run(command, check=True)


def live(model: Any) -> Step:
    """Full-distribution KL against a teacher in the loop."""
    teacher = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.bfloat16).eval()

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
        "cache: dense reconstruction": (cached(CACHE, *full), full),
        "live teacher: forward KL over all of V": (live, ()),
    }


def measure_step(name: str) -> dict[str, float]:
    """Seconds of the best step, and the peak of resident memory in MiB."""
    make, terms = paths()[name]
    reader = CacheReader.open(CACHE)
    groups = [reader.find(kind) for kind in sorted(Objective.of(terms).needs())]
    data = CachedDataset(reader, range(len(reader)), groups)
    assert (reader.lengths == LENGTH).all()
    collate = Collator(groups, 0)
    model = student(RUN / "teacher", STUDENT_DEPTH)
    step, optimizer = make(model), torch.optim.AdamW(model.parameters(), 1e-4)
    best = float("inf")
    for number in range(STEPS + 1):
        began = time.perf_counter()
        batch = collate([data[BATCH * number + i] for i in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            loss = step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:
            best = min(best, time.perf_counter() - began)
    return {"seconds": best, "peak": peak_mib()}


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
        (f"step, {KL}", steps[KL]["seconds"] / base["seconds"], 1.05),
        (f"step, {HIDDEN}", steps[HIDDEN]["seconds"] / base["seconds"], 1.10),
        (f"peak memory, {KL}", steps[KL]["peak"] / base["peak"], 1.02),
        (f"peak memory, {HIDDEN}", steps[HIDDEN]["peak"] / base["peak"], 1.02),
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
            f"{one['seconds'] / base['seconds']:.3f}",
            f"{one['peak']:,.0f} MiB",
            f"{one['peak'] / base['peak']:.3f}",
        ]
        for name, one in best.items()
    ]
    steps = table(["", "step", "of labels", "peak memory", "of labels"], rows)
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
    write_result("train_speed", "What a training step costs", body)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"step": measure_step, "loss": measure_loss}[sys.argv[1]](sys.argv[2])))
    else:
        main()
