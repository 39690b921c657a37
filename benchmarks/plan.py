"""What `distily-train plan` says beside what trainings take, each in its own process.

A small store with all column groups, `RUN/plan-store`, is made of the demo teacher first.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from common import BIN, ROOT, RUN, table, write_result
from transformers import TrainerCallback

sys.path.insert(0, str(ROOT))

from student.config.parser import parse
from student.planning.command import target_of
from student.planning.training import plan_training
from student.training.run import build, prepare
from student.training.trainer import CacheTrainer
from tests.student.allocations import trained_at_most

STORE = (
    *("--num-samples", "12", "--max-seq-len", "256", "--hidden-layers", "15", "--final"),
    *("--dtype", "float32", "--engine", "transformers"),
)
COMMON = (
    *("--student-model-config", '{"num_hidden_layers": 5}', "--max-steps", "2", "--save-strategy", "no"),
    *("--eval-strategy", "no", "--eval-on-start", "False", "--report-to", "none"),
    *("--per-device-train-batch-size", "2", "--copy-layers", "uniform", "--eval-fraction", "0"),
)
TERNARY = ("--student-model-as-bitnet",)
BF16, FP32 = ("--bf16",), ("--no-bf16",)
RUNS: dict[str, tuple[str, ...]] = {
    "full precision, float32": FP32,
    "full precision, bf16 autocast": BF16,
    "the same, checkpointing": (*BF16, "--gradient-checkpointing"),
    "the same, adamw_bnb_8bit": (*BF16, "--optim", "adamw_bnb_8bit"),
    "the same, hidden loss": (*BF16, "--hidden-loss", "cosine"),
    "the same, dense head": (*BF16, "--logits-loss", "full_jsd"),
    "ternary, bf16 autocast": (*BF16, *TERNARY),
    "ternary, checkpointing": (*BF16, *TERNARY, "--gradient-checkpointing"),
    "ternary, subln, bf16 masters": (
        *(*BF16, *TERNARY, "--bitnet-conversion", "subln", "--bitnet-masters", "bf16"),
        *("--learning-rate", "1e-2"),
    ),
    "ternary, adafactor, 2 accumulated": (
        *(*BF16, *TERNARY, "--optim", "adafactor", "--gradient-accumulation-steps", "2"),
    ),
}


def main() -> None:
    rows, ratios, speeds = [], [], []
    store, processes = RUN / "plan-store", get_context("fork")
    generate = [BIN / "distily-cache", "generate", RUN / "teacher", ROOT / "docs", "--out", store, *STORE]
    subprocess.run([str(word) for word in generate], check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in RUNS.items():
            found: Any = processes.SimpleQueue()
            words = [str(store), "--output-dir", str(Path(folder) / name), *COMMON, *flags]
            child = processes.Process(target=worker, args=(words, found))
            child.start()
            planned, seen = found.get()
            child.join()
            memory = planned["memory"]
            step = [memory["whole"][part] for part in ("weights", "gradients", "optimizer state")]
            exact = step == [seen["weights"], seen["gradients"], seen["optimizer"]]
            tensors = memory["peak_bytes"] - memory["at_peak"]["process"]
            ratios.append(seen["tensors"] / tensors)
            speeds.append(seen["seconds"] / planned["estimated_seconds_per_step"])
            rows.append(
                [
                    name,
                    " + ".join(_mib(size) for size in step),
                    "equal" if exact else "not equal",
                    _mib(tensors),
                    _mib(seen["tensors"]),
                    f"{ratios[-1]:.4f}",
                    _mib(seen["resident"]),
                    f"{speeds[-1]:.1f}",
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    header = [
        *("training", "weights + gradients + optimizer, MiB", "real tensors", "planned peak, MiB"),
        *("allocated peak, MiB", "allocated / planned", "resident, MiB", "step time / its products"),
    ]
    body = (
        "5-layer students of SmolLM2-135M (V = 49,152, D = 576), batch 2 x 256, two steps on a CPU.\n\n"
        f"{table(header, rows)}\n\n"
        f"The peak that torch's allocator reported is {min(ratios):.4f} to {max(ratios):.4f} times the "
        "planned one, which is of tensors alone. *Resident* is what the process took at its fullest beyond "
        "what it had before the student was built: pages of mapped files, code that is loaded late and "
        "buffers of libraries for matrix products are in it, and it says nothing about a GPU. Steps took "
        f"{min(speeds):.1f} to {max(speeds):.1f} times as long as their matrix products alone, which is what "
        "the plan's time counts."
    )
    write_result("plan", "The plan of a training beside trainings", body)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Gradients, and the quickest step."""

    began, seconds, gradients = 0.0, float("inf"), 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.gradients = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = min(self.seconds, time.perf_counter() - self.began)


def worker(words: list[str], found: Any) -> None:
    """Plan, train, and send both."""
    prepared = prepare(parse(words))
    planned = plan_training(prepared, target_of()).to_json()
    before, watch = psutil.Process().memory_info().rss, Watch()

    def watched() -> CacheTrainer:
        trainer = build(prepared).trainer
        trainer.add_callback(watch)
        return trainer

    trainer, tensors = trained_at_most(watched)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    weights = sum(one.nbytes for one in (*trainer.model.parameters(), *trainer.model.buffers()))
    seen = {"weights": weights, "gradients": watch.gradients, "optimizer": state_bytes(trainer.optimizer)}
    found.put((planned, seen | {"tensors": tensors, "resident": resident, "seconds": watch.seconds}))


def state_bytes(optimizer: Any) -> int:
    """Of the tensors in an optimizer's state, shared ones once."""
    held = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    main()
