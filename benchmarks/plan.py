"""What `distily-train plan` says beside what trainings take, each in its own process.

The students have the shape of SmolLM2-135M with 5 layers, and random weights: memory is the same.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import ROOT, table, write_result
from transformers import LlamaConfig, TrainerCallback

sys.path.insert(0, str(ROOT))

from featurestore.format.schema import Sample
from student.config.parser import parse
from student.planning.command import target_of
from student.planning.training import plan_training
from student.training.run import build, prepare
from student.training.trainer import CacheTrainer
from tests.student.allocations import allocated_at_most
from tests.student.caches import write_unreal_cache
from tests.teachers import word_tokenizer

TEACHER = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)
TOKENS = 64
COMMON = (
    *("--student-model-config", '{"num_hidden_layers": 5}', "--init", "random", "--max-steps", "2"),
    *("--save-strategy", "no", "--eval-strategy", "no", "--eval-on-start", "False", "--report-to", "none"),
    *("--per-device-train-batch-size", "2", "--eval-fraction", "0"),
)
TERNARY = ("--student-model-as-bitnet",)
RUNS: dict[str, tuple[str, ...]] = {
    "full precision": (),
    "the same, checkpointing": ("--gradient-checkpointing",),
    "the same, adamw_bnb_8bit": ("--optim", "adamw_bnb_8bit"),
    "ternary": TERNARY,
    "ternary, subln, bf16 masters": (
        *(*TERNARY, "--bitnet-conversion", "subln", "--bitnet-masters", "bf16"),
        *("--learning-rate", "1e-2"),
    ),
    "ternary, adafactor, 2 accumulated": (
        *(*TERNARY, "--optim", "adafactor", "--gradient-accumulation-steps", "2"),
    ),
    "full precision, bf16 autocast": ("--bf16",),
}


def main() -> None:
    rows, ratios = [], []
    processes = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        for name, flags in RUNS.items():
            found: Any = processes.SimpleQueue()
            precision = () if "--bf16" in flags else ("--no-bf16",)
            words = [str(store), "--output-dir", str(Path(folder) / name), *COMMON, *precision, *flags]
            child = processes.Process(target=worker, args=(words, found))
            child.start()
            planned, seen = found.get()
            child.join()
            memory = planned["memory"]
            step = [memory["whole"][part] for part in ("weights", "gradients", "optimizer state")]
            exact = step == [seen["weights"], seen["gradients"], seen["optimizer"]]
            tensors = memory["peak_bytes"] - memory["at_peak"]["process"] - memory["at_peak"]["batch"]
            ratios.append(seen["tensors"] / tensors)
            rows.append(
                [
                    name,
                    " + ".join(_mib(size) for size in step),
                    "equal" if exact else "not equal",
                    _mib(tensors),
                    _mib(seen["tensors"]),
                    f"{ratios[-1]:.5f}",
                    _mib(seen["resident"]),
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    header = [
        *("training", "weights + gradients + optimizer, MiB", "real tensors", "planned peak, MiB"),
        *("allocated peak, MiB", "allocated / planned", "resident, MiB"),
    ]
    body = (
        f"Students of 5 layers of SmolLM2-135M (V = 49,152, D = 576), batch 2 x {TOKENS}, two steps on a "
        f"CPU, in float32 where nothing else is said.\n\n{table(header, rows)}\n\nThe peak that torch's "
        f"allocator reported is {min(ratios):.5f} to {max(ratios):.5f} times the planned one. Both are "
        "without batches, which are numpy's. *Resident* is what the process took at its fullest beyond what "
        "it had before the student was built: code that is loaded late, buffers of matrix products and "
        "what the C library does not give back are in it, and it says nothing about a GPU."
    )
    write_result("plan", "The plan of a training beside trainings", body)


def make_store(folder: Path) -> Path:
    """Eight samples of the same length, with nothing that a teacher has said."""
    TEACHER.save_pretrained(folder / "teacher")
    word_tokenizer(199).save_pretrained(folder / "teacher")
    rng, mask = np.random.default_rng(0), np.ones(TOKENS, bool)
    samples = [
        Sample(tokens=rng.integers(TEACHER.vocab_size, size=TOKENS).astype(np.int32), loss_mask=mask)
        for _ in range(8)
    ]
    return write_unreal_cache(folder / "store", folder / "teacher", samples)


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Their bytes, when they are all there."""

    size = 0

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.size = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)


def worker(words: list[str], found: Any) -> None:
    """Plan, train, and send both."""
    prepared = prepare(parse(words))
    planned = plan_training(prepared, target_of()).to_json()
    before, gradients = psutil.Process().memory_info().rss, Gradients()

    def watched() -> CacheTrainer:
        trainer = build(prepared).trainer
        trainer.add_callback(gradients)
        return trainer

    trainer, tensors = allocated_at_most(watched, CacheTrainer.train)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    weights = sum(one.nbytes for one in (*trainer.model.parameters(), *trainer.model.buffers()))
    seen = {"weights": weights, "gradients": gradients.size, "optimizer": state_bytes(trainer.optimizer)}
    found.put((planned, seen | {"tensors": tensors, "resident": resident}))


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
