"""Does an int8 backward pass train as well as a full one, and what does it cost?

A ternary student of 4 layers (`--bitnet-conversion subln`), copied from the teacher's, with the teacher's
embeddings and head, which stay as they are, learns from the cache of `kd_quality.py`: each step a sample of
256 tokens; bfloat16 autocast, AdamW, cosine. For one seed both rows see the same batches in the same order,
from the same initial weights; the seed chooses the order. They are trainings by `distily-train from-cache`
that differ in `--bitnet-backward` alone, and KL and CE are what that reports of held-out samples.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import RUN, train, write_result
from int8_report import plot, report
from torch import Tensor

from featurestore.reader import CacheReader
from student import bitnet
from student.bitnet import backward
from student.data.batches import CachedDataset, Collator
from student.modeling.saving import load_student
from student.objective.terms import Objective, term
from student.training.model import DistillationModel
from student.training.plan import load_teacher, plan_data, plan_split

STEPS, SEEDS = int(os.environ.get("STEPS", "300")), range(int(os.environ.get("SEEDS", "3")))
LAYERS, RATE, HELD_OUT, LOGGED = 4, 1e-3, 0.08, 10
ROWS = ("full", "int8")
ROUNDS = 8  # of timed steps
CACHE, WORK = RUN / "quality" / "cache", RUN / "int8"


def settings() -> dict[str, Any]:
    """What makes results comparable."""
    manifest = CacheReader.open(CACHE).manifest_digest
    return {"manifest": manifest, "steps": STEPS, "layers": LAYERS, "rate": RATE, "held_out": HELD_OUT}


def run(row: str, seed: int) -> dict[str, Any]:
    """One training, or what it found when it ran with these settings before."""
    file = WORK / f"{row}-{seed}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") == settings():
        return found
    output = WORK / f"{row}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    student = (
        "--student-model-config",
        json.dumps({"num_hidden_layers": LAYERS}),
        "--student-model-as-bitnet",
    )
    summary = train(
        output,
        *student,
        *("--bitnet-conversion", "subln", "--bitnet-backward", row, "--freeze-embeddings"),
        *("--teacher", str(RUN / "teacher"), "--eval-fraction", str(HELD_OUT), "--seed", str(seed)),
        *("--bf16", "--per-device-train-batch-size", "1", "--max-steps", str(STEPS)),
        *("--learning-rate", str(RATE), "--logging-steps", str(LOGGED)),
        *("--save-strategy", "no", "--eval-strategy", "no", "--report-to", "none"),
        cache=CACHE,
    )
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    last = summary["last_eval"]
    found = {
        "settings": settings(),
        "curve": [(entry["step"], entry["loss"]) for entry in logs if "loss" in entry],
        "cosines": [
            entry["bitnet_backward_cosine_min"] for entry in logs if row == "int8" and "loss" in entry
        ],
        "fallbacks": [
            entry["bitnet_backward_fallbacks"] for entry in logs if row == "int8" and "loss" in entry
        ],
        "kl": last["eval_kl"],
        "ce": last["eval_ce"],
    }
    file.with_suffix(".partial").write_text(json.dumps(found))
    file.with_suffix(".partial").rename(file)
    if (row, seed) != ("int8", 0):
        shutil.rmtree(output)
    return found


class Recorder(backward.Gate):
    """Keeps what a product is made of, and lets it be full."""

    operands: tuple[Any, ...] = ()

    def choose(self, int8: backward.Product, full: backward.Product, *operands: Any) -> Tensor:
        self.operands = operands
        return full(*operands)


class Trained:
    """The int8 row's student after its training, and batches of a cache."""

    def __init__(self, cache: Path) -> None:
        reader = CacheReader.open(cache)
        objective = Objective.of((term("kl"),))
        student = load_student(WORK / "int8-0")
        student.get_input_embeddings().requires_grad_(False)
        self.model = DistillationModel(student, objective, load_teacher(objective, reader)).train()
        self.data: CachedDataset = plan_data(objective, reader, plan_split(reader, HELD_OUT)).train
        self.collate = Collator(self.data.groups, 0, False, True)
        self.layers = dict(bitnet.bit_linears(student))

    def step(self, first: int, samples: int) -> None:
        """Forward and backward of some samples, as the trainer runs them."""
        batch = self.collate([self.data[i] for i in range(first, first + samples)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**batch)["loss"]
        loss.backward()
        self.model.zero_grad()

    def gate(self, make: Any) -> None:
        for layer in self.layers.values():
            layer.gates = make()


def cosines(trained: Trained, samples: int, batches: int, name: str) -> dict[str, Any]:
    """The lowest over some batches: per layer and product, and over all layers by way of rounding."""
    layers: dict[str, dict[str, float]] = {name: {"dX": 1.0, "dW": 1.0} for name in trained.layers}
    ways: dict[str, float] = {}
    for index in range(batches):
        trained.gate(lambda: backward.Gates(Recorder(), Recorder()))
        trained.step(index * samples, samples)
        for where, layer in trained.layers.items():
            assert layer.gates is not None
            products = (
                ("dX", layer.gates.inputs, backward.int8_input_gradient, backward.full_input_gradient),
                ("dW", layer.gates.weights, backward.int8_weight_gradient, backward.full_weight_gradient),
            )
            for product, gate, int8, full in products:
                assert isinstance(gate, Recorder)
                if not gate.operands:  # the first layer's input needs no gradient
                    continue
                right = full(*gate.operands)
                found = backward.cosine(int8(*gate.operands), right)
                layers[where][product] = min(layers[where][product], found)
                for way, value in rounded(product, *gate.operands).items():
                    ways[way] = min(ways.get(way, 1.0), backward.cosine(value, right))
    return {"name": f"{batches} batches of {name}", "layers": layers, "ways": ways}


def rounded(product: str, grad_NO: Tensor, other: Tensor, scale: Tensor, *_: Any) -> dict[str, Tensor]:
    """The product by each way to round its gradient that was considered, in float32. scale: of the weight
    for dX, the inverse of those of the activations for dW.
    """

    def quantised(x: Tensor, dim: int, stochastic: bool) -> Tensor:
        step = x.abs().amax(dim, keepdim=True).clamp(min=1e-30) / bitnet.LEVELS
        ints = x / step
        return (torch.floor(ints + torch.rand_like(ints)) if stochastic else ints.round()) * step

    found = {}
    for stochastic in (False, True):
        how = "stochastic" if stochastic else "to nearest"
        if product == "dX":
            own = quantised(grad_NO.float(), 1, stochastic)
            found[f"dX, per token, {how}"] = own @ other.float()
            continue
        scaled_NO = grad_NO.float() / scale
        for tokens in (len(scaled_NO), backward.block_size("cpu"), 64):
            own = torch.cat([quantised(part, 0, stochastic) for part in scaled_NO.split(tokens)])
            size = "all" if tokens == len(scaled_NO) else tokens
            found[f"dW, per output and {size} tokens, {how}"] = own.t() @ other.float()
    return found


def step_seconds(trained: Trained) -> dict[str, float]:
    """Shortest CPU time of a forward and backward pass of one sample, both ways by turns."""
    best: dict[str, float] = {}
    bitnet.quantize_once(trained.model)
    for _ in range(ROUNDS):
        for row in ROWS:
            made = backward.Gates(*(backward.Gate(False, 1.0) for _ in range(2))) if row == "int8" else None
            trained.gate(lambda made=made: made)
            began = time.process_time()
            trained.step(0, 1)
            best[row] = min(best.get(row, float("inf")), time.process_time() - began)
    return best


def product_seconds() -> list[tuple[str, float, float, float]]:
    """Shortest CPU time of one product in int8, bfloat16 and float32, at sizes of this student."""
    found = []
    for size in ((1024, 576, 1536), (1024, 1536, 576), (256, 576, 1536), (256, 1536, 576), (1536, 256, 576)):
        rows, inner, columns = size
        a = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
        b = torch.randint(-1, 2, (columns, inner), dtype=torch.int8).t()
        times = []
        for dtype in (torch.int8, torch.bfloat16, torch.float32):
            x, y = a.to(dtype), b.to(dtype)
            multiply = bitnet.int_mm if dtype == torch.int8 else torch.mm
            multiply(x, y)
            best = float("inf")
            for _ in range(20):
                began = time.process_time()
                multiply(x, y)
                best = min(best, time.process_time() - began)
            times.append(best)
        found.append((f"{rows} × {inner} @ {inner} × {columns}", *times))
    return found


def measure() -> dict[str, Any]:
    """What is no training: cosines and times; or what was found with these settings before."""
    file = WORK / "measured.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") == settings():
        return found
    trained = Trained(CACHE)
    whole = "8 samples of the demo cache, 512 tokens and less"
    found = {
        "settings": settings(),
        "seconds": step_seconds(trained),
        "products": product_seconds(),
        "cosines": [
            cosines(trained, 1, 4, "256 tokens"),
            cosines(Trained(RUN / "cache"), 8, 2, whole),
        ],
    }
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    WORK.mkdir(exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for seed in SEEDS:
        for row in ROWS:
            began = time.perf_counter()
            runs[row].append(run(row, seed))
            kl, seconds = runs[row][-1]["kl"], time.perf_counter() - began
            print(f"{row}, seed {seed}: KL {kl:.4f}, {seconds:.0f} s", flush=True)
    plot(runs)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    write_result("int8_backward", "The int8 backward pass", f"{intro}\n\n{report(runs, measure())}")


if __name__ == "__main__":
    main()
