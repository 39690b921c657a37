"""What a student learns from a live teacher, from caches of it, and from labels, at equal tokens.

A student of 4 layers, copied from the teacher's in full precision, with the teacher's embeddings and head,
which stay as they are, learns from the demo text (each step a sample of 256 tokens; bfloat16 autocast, AdamW,
cosine). For one seed all rows see the same batches in the same order, from the same initial weights; the seed
chooses the order. All rows but the live one are the product's own path: one store, its reader, collator,
trainer and losses. The live row swaps the loss for the KL over the whole vocabulary from a teacher that runs
in every step, in bfloat16 as it did for the cache.

What is compared is no loss of any row: KL(teacher‖student) in nats over the whole vocabulary and perplexity,
both in float32, on samples that no row has learned from, with the teacher in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, RUN, generate, write_result
from quality_report import Curve, plot, report
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from student.config.flags import StudentOptions
from student.config.parser import defaults
from student.data.batches import IGNORE, CachedDataset
from student.data.held_out import split_cache
from student.losses.catalogue import Loss, Need, Paper
from student.losses.sparse import ReducedLogits, SparseTargets
from student.modeling.plan import plan_student
from student.objective.terms import Objective, Term, term
from student.objective.weights import Weight
from student.training.model import DistillationModel
from student.training.plan import load_teacher
from student.training.trainer import CacheTrainer

STEPS, SEEDS = int(os.environ.get("STEPS", "150")), range(int(os.environ.get("SEEDS", "3")))
BATCH, LENGTH, RATE, LAYERS = 1, 256, 2e-3, 4
POINTS = 4  # how often the held-out samples are measured
HELD_OUT, MEASURED = 0.08, 10  # share of the samples that nobody learns from; how many of them are measured
JOBS = 2  # trainings at a time, of one thread each
DEPTH = 30  # the demo teacher's layers
WORK = RUN / "quality"


def top_k_alone(student: ReducedLogits, teacher: SparseTargets) -> Tensor:
    """-sum of p log q over the head, [N], as plain top-k distillation has it: gradient (sum p) q - p."""
    real_NK = torch.isfinite(teacher.logprob_NK)
    surprise_NK = (student.lse().unsqueeze(-1) - student.head_NK).masked_fill(~real_NK, 0.0)
    return (teacher.logprob_NK.exp() * surprise_NK).sum(-1)


ALONE = Term(
    loss=Loss(
        name="top_k_alone",
        kind="head",
        function=top_k_alone,
        formula="−Σ p log q over the head",
        paper=Paper("Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", "2503.16870"),
        needs=Need.HEAD,
        exactness="coarse",
        statement="nothing stands for what is outside the head",
    ),
    weight=Weight.constant(1.0),
    label="top_k_alone",
)


@dataclass(frozen=True)
class Row:
    """One way to learn. term: None for the live teacher; group: what it reads of the cache."""

    name: str
    term: Term | None
    group: GroupSpec | None = None


FULL = term("full_kl", pair=(DEPTH, LAYERS))
ROWS = {
    "live": Row("live teacher, full KL", None),
    "default": Row("cache, default: p=0.7, k≤12, and 16 draws", term("kl"), LogitsSpec(12, 0.7, 16)),
    "final": Row("cache, `--final`: full KL", FULL, HiddenSpec(DEPTH)),
    "top50": Row("top-50, one bucket for the rest", term("kl"), LogitsSpec(50)),
    "top12": Row("top-12, one bucket for the rest", term("kl"), LogitsSpec(12)),
    "top12_alone": Row("top-12 and nothing else", ALONE, LogitsSpec(12)),
    "labels": Row("labels alone (CE)", term("ce")),
}


class LiveTeacher(DistillationModel):
    """KL over the whole vocabulary from a teacher in the loop."""

    def __init__(self, student: Any) -> None:
        super().__init__(student, Objective.of((term("ce"),)))
        teacher = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.bfloat16).eval()
        self._live = [teacher]  # in a list, so that it is no part of the module

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> dict[str, Tensor]:
        learned = labels != IGNORE
        with torch.no_grad():
            wanted = (
                self._live[0](input_ids=input_ids, use_cache=False).logits[learned].float().log_softmax(-1)
            )
        own = self.student(input_ids=input_ids, use_cache=False).logits[learned].float().log_softmax(-1)
        total = functional.kl_div(own, wanted, log_target=True, reduction="sum")
        loss = total / rest["num_items_in_batch"]
        return {"loss": loss, "terms": loss.detach().unsqueeze(0)}


class HeldOut(TrainerCallback):
    """Measures the student POINTS times, the last time at the end."""

    def __init__(self) -> None:
        kept = torch.load(WORK / "held_out.pt")
        self.ids_ST, self.states_STD, self.head_VD = kept["ids"], kept["states"], kept["head"]
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in {round(STEPS * i / POINTS) for i in range(1, POINTS + 1)}:
            began = time.perf_counter()
            tokens = state.global_step * BATCH * LENGTH
            self.points.append({"tokens": tokens, **self.measure(kwargs["model"].student)})
            self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """Mean KL from the teacher and mean cross-entropy, nats per position, over the whole vocabulary."""
        kl = ce = 0.0
        for ids_T, states_TD in zip(self.ids_ST, self.states_STD, strict=True):
            p_TV = (states_TD[:-1] @ self.head_VD.t()).log_softmax(-1)
            q_TV = student(input_ids=ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
            ce -= float(q_TV.gather(1, ids_T[1:, None]).sum())
        count = self.ids_ST.numel() - len(self.ids_ST)
        return {"kl": kl / count, "ce": ce / count}


def train(key: str, seed: int) -> None:
    """One row with one seed, in this process; leaves its result beside the others."""
    row, reader = ROWS[key], CacheReader.open(WORK / "cache")
    shape = json.dumps({"num_hidden_layers": LAYERS})
    options = StudentOptions(student_model_config=shape, freeze_embeddings=True)
    torch.manual_seed(seed)
    student, _ = plan_student(options, reader).build()
    if row.term is None:
        model = LiveTeacher(student)
    else:
        objective = Objective.of((row.term,))
        model = DistillationModel(student, objective, load_teacher(objective, reader))
    chosen = split_cache(reader, HELD_OUT).training
    data = CachedDataset(reader, chosen, [row.group] if row.group else [])
    held_out = HeldOut()
    first = held_out.measure(student)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            **defaults()
            | {
                "bf16": True,
                "per_device_train_batch_size": BATCH,
                "learning_rate": RATE,
                "max_steps": STEPS,
                "seed": seed,
                "save_strategy": "no",
                "eval_strategy": "no",
                "eval_on_start": False,
                "logging_strategy": "no",
                "logging_first_step": False,
                "report_to": "none",
                "disable_tqdm": True,
            },
        )
        trainer = CacheTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=None,
            vocab_size=reader.identity.vocab_size,
            tokenizer_dir=reader.teacher_dir,
        )
        trainer.add_callback(held_out)
        began = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - began - held_out.seconds
    points = [{"tokens": 0, **first}, *held_out.points]
    found = {"settings": settings(), "points": points, "seconds": seconds, "measuring": held_out.seconds}
    partial = result_file(key, seed).with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(result_file(key, seed))


def settings() -> dict[str, Any]:
    """What makes results comparable."""
    manifest = CacheReader.open(WORK / "cache").manifest_digest
    sizes = {"steps": STEPS, "batch": BATCH, "length": LENGTH, "layers": LAYERS, "measured": MEASURED}
    return {"manifest": manifest, "rate": RATE, **sizes}


def result_file(key: str, seed: int) -> Path:
    return WORK / f"{key}-{seed}.json"


def result(key: str, seed: int) -> dict[str, Any] | None:
    """What a run found, None where it has not ended yet or had other settings."""
    file = result_file(key, seed)
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("settings") == settings() else None


def prepare() -> float:
    """The store with all that the rows read, and the teacher's side of the held-out samples; returns the
    teacher's own cross-entropy there.
    """
    samples = MEASURED + round(STEPS * BATCH / (1 - HELD_OUT)) + 20
    for flags in (["--final"], ["--top-k", "50"]):
        generate(WORK / "cache", "--pack", "--max-seq-len", LENGTH, "--num-samples", samples, *flags)
    reader = CacheReader.open(WORK / "cache")
    chosen = split_cache(reader, HELD_OUT).held_out
    tokens = [torch.from_numpy(reader.read(i, []).tokens).long() for i in chosen]
    ids_ST = torch.stack([ids for ids in tokens if len(ids) == LENGTH][:MEASURED])
    teacher = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.float32).eval()
    with torch.no_grad():
        states = [teacher.model(ids[None], use_cache=False).last_hidden_state[0] for ids in ids_ST]
    kept = {"ids": ids_ST, "states": torch.stack(states), "head": teacher.lm_head.weight.detach()}
    torch.save(kept, WORK / "held_out.pt")
    return HeldOut().measure(teacher)["ce"]


def run_all() -> None:
    """Every run whose result is missing, JOBS at a time, in processes of one thread."""
    todo = [(key, seed) for seed in SEEDS for key in ROWS if result(key, seed) is None]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(one: tuple[str, int]) -> None:
        began = time.perf_counter()
        command = [sys.executable, __file__, one[0], str(one[1])]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = result(*one)
        assert found is not None
        last = found["points"][-1]
        print(
            f"{one[0]}, seed {one[1]}: KL {last['kl']:.4f}, {time.perf_counter() - began:.0f} s", flush=True
        )

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, todo))


def main() -> None:
    teacher_ce = prepare()
    run_all()
    found = {key: [result(key, seed) for seed in SEEDS] for key in ROWS}
    curves = {key: Curve.of(row.name, [one for one in found[key] if one]) for key, row in ROWS.items()}
    plot(curves)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = f"{intro}\n\n{report(curves, teacher_ce)}"
    write_result("kd_quality", "What a student learns: live teacher, caches, labels", body)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
