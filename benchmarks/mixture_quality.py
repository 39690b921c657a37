"""What a student learns from two cached teachers, mixed, and from both teachers themselves.

The teachers are the demo teacher and a copy of it that was fine-tuned on the first half of the demo text by
plain transformers. A student of 3 layers and a third of their width, of the demo teacher's weights narrowed,
learns from their mixture (each step a sample of 128 tokens; float32, AdamW, cosine): once with its
embeddings, which are also its LM head, as they are, and once with all weights trained. For one seed the rows
of either see the same batches in the same order, from the same initial weights; the seed chooses the order.
The cached rows are the product's own commands, `distily-cache generate` for each teacher and `distily-train
from-cache` on the stores. The live row is the same request, planned and trained by the same code, with the
loss swapped for the KL over the whole vocabulary from the exact mixture. Both teachers are in memory for it:
their final states of each sample, run once by transformers in float32 before the training, and their LM
heads, which are multiplied in every step.

What is compared is no loss of any row: KL(mixture‖student) in nats over the whole vocabulary, in float32, on
samples that no student has learned from.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import BIN, ROOT, RUN, table, write_result
from shifted_teacher import shifted_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM

from featurestore.reader import CacheReader
from student.config.parser import parse
from student.data.batches import IGNORE
from student.data.mixture import mixed_logs
from student.training.model import DistillationModel
from student.training.plan import plan_split
from student.training.run import assemble, prepare
from student.training.trainer import CacheTrainer

SEEDS = range(int(os.environ.get("SEEDS", "3")))
BATCH, LENGTH, RATE = 1, 128, "2e-3"
SAMPLES, TRAINED = 290, 150  # in the stores; that are learned from, as often as the steps take
WEIGHTS, HELD_OUT = (0.6, 0.4), 0.1
SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
WORK = RUN / "mixture"
STORES = (WORK / "first", WORK / "second")


@dataclass(frozen=True)
class Row:
    """One way to learn. frozen: whether the student's embeddings, which are its LM head, stay as they are."""

    name: str
    live: bool
    frozen: bool
    steps: int


ROWS = {
    "live_frozen": Row("both teachers live, embeddings frozen", True, True, 100),
    "cached_frozen": Row("two caches, mixed, embeddings frozen", False, True, 100),
    "live": Row("both teachers live, all weights trained", True, False, 200),
    "cached": Row("two caches, mixed, all weights trained", False, False, 200),
}


class Mixture:
    """The exact mixture of both teachers at the positions of known samples."""

    def __init__(self) -> None:
        kept = torch.load(WORK / "states.pt")
        self.ids_ST: Tensor = kept["ids"]
        self._place = {bytes(ids.numpy().tobytes()): place for place, ids in enumerate(self.ids_ST)}
        self._states: list[Tensor] = kept["states"]
        self._heads: list[Tensor] = kept["heads"]

    def each(self, ids_BT: Tensor) -> list[Tensor]:
        """log p of each teacher, float32 [B, T, V]."""
        places = [self._place[ids.numpy().tobytes()] for ids in ids_BT]
        return [
            (states[places] @ head.t()).log_softmax(-1)
            for states, head in zip(self._states, self._heads, strict=True)
        ]

    def logs(self, ids_BT: Tensor) -> Tensor:
        """log p of the mixture, float32 [B, T, V]."""
        return mixed_logs(self.each(ids_BT), WEIGHTS)


class LiveTeachers(DistillationModel):
    """KL over the whole vocabulary from both teachers' mixture."""

    def __init__(self, planned: DistillationModel, teachers: Mixture) -> None:
        super().__init__(planned.student, planned.objective)
        self._live = teachers

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> dict[str, Tensor]:
        if not self.training:  # what the product measures on its way is no part of the study
            return super().forward(input_ids, labels, **rest)
        learned = labels != IGNORE
        with torch.no_grad():
            wanted = self._live.logs(input_ids)[learned]
        own = self.student(input_ids=input_ids, use_cache=False).logits[learned].log_softmax(-1)
        total = torch.nn.functional.kl_div(own, wanted, log_target=True, reduction="sum")
        loss = total / rest["num_items_in_batch"]
        return {"loss": loss, "terms": loss.detach().unsqueeze(0)}


@torch.no_grad()
def measure(student: Any, teachers: Mixture) -> float:
    """Mean KL from the mixture, nats per position, over the whole vocabulary, on the held-out samples."""
    total, count = 0.0, 0
    for ids_1T in held_out():
        log_p_TV = teachers.logs(ids_1T)[0, :-1]
        log_q_TV = student(input_ids=ids_1T, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        count += len(log_q_TV)
    return total / count


def held_out() -> list[Tensor]:
    """Tokens [1, T] of each held-out sample."""
    reader = CacheReader.open(STORES[0])
    chosen = plan_split(reader, HELD_OUT).held_out
    return [torch.from_numpy(reader.read(index, []).tokens).long()[None] for index in chosen]


def flags(row: Row, seed: int, out: str) -> list[str]:
    """Of from-cache."""
    weights = ",".join(map(str, WEIGHTS))
    return [
        *map(str, STORES),
        *(
            "--teacher-weights",
            weights,
            "--output-dir",
            out,
            "--seed",
            str(seed),
            "--max-steps",
            str(row.steps),
        ),
        *("--student-model-config", json.dumps(SHAPE), "--teacher", str(RUN / "teacher"), "--no-bf16"),
        *("--per-device-train-batch-size", str(BATCH), "--learning-rate", RATE, "--save-strategy", "no"),
        *("--eval-fraction", str(HELD_OUT), "--train-samples", str(TRAINED), "--eval-strategy", "no"),
        *("--report-to", "none", "--quiet", "--freeze-embeddings", str(row.frozen)),
    ]


def train_live(row: Row, seed: int, out: str, teachers: Mixture) -> Any:
    """The student that both teachers have taught, from the request of the cached row."""
    assembled = assemble(prepare(parse(flags(row, seed, out))))
    model = LiveTeachers(assembled.model, teachers)
    trainer = CacheTrainer(**assembled.for_trainer() | {"model": model})
    trainer.train()
    return model.student.eval()


def train_cached(row: Row, seed: int, out: str) -> Any:
    """The student that the command makes."""
    command = [BIN / "distily-train", "from-cache", *flags(row, seed, out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def run(key: str, seed: int) -> None:
    """One row with one seed; leaves its result beside the others."""
    row, teachers = ROWS[key], Mixture()
    with tempfile.TemporaryDirectory() as out:
        trained = train_live(row, seed, out, teachers) if row.live else train_cached(row, seed, out)
        found = {"settings": settings(row), "kl": measure(trained, teachers)}
    partial = result_file(key, seed).with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(result_file(key, seed))


def settings(row: Row) -> dict[str, Any]:
    """What makes results comparable."""
    manifests = [CacheReader.open(store).manifest_digest for store in STORES]
    return {"manifests": manifests, "steps": row.steps, "trained": TRAINED, "rate": RATE, "shape": SHAPE}


def result_file(key: str, seed: int) -> Path:
    return WORK / f"{key}-{seed}.json"


def result(key: str, seed: int) -> float | None:
    """The KL that a run has come to; None where it has not ended yet or had other settings."""
    file = result_file(key, seed)
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found["kl"] if found.get("settings") == settings(ROWS[key]) else None


def prepare_stores() -> None:
    """A store of each teacher, and the final states and LM heads of both."""
    teachers = (RUN / "teacher", shifted_teacher())
    for seed, (teacher, store) in enumerate(zip(teachers, STORES, strict=True)):
        command = [
            *(BIN / "distily-cache", "generate", teacher, RUN / "topics.jsonl", "--out", store),
            *("--engine", "transformers", "--dtype", "float32", "--pack", "--max-seq-len", str(LENGTH)),
            *("--num-samples", str(SAMPLES), "--seed", str(seed)),
        ]
        subprocess.run(command, check=True)
    if (WORK / "states.pt").is_file():
        return
    reader = CacheReader.open(STORES[0])
    split = plan_split(reader, HELD_OUT, TRAINED)
    chosen = [*split.training, *split.held_out]
    ids_ST = torch.stack([torch.from_numpy(reader.read(i, []).tokens).long() for i in chosen])
    kept: dict[str, Any] = {"ids": ids_ST, "states": [], "heads": []}
    for teacher in teachers:
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        with torch.no_grad():
            states = [model.model(ids[None], use_cache=False).last_hidden_state[0] for ids in ids_ST]
        kept["states"].append(torch.stack(states))
        kept["heads"].append(model.lm_head.weight.detach())
    torch.save(kept, WORK / "partial.pt")
    (WORK / "partial.pt").rename(WORK / "states.pt")


@torch.no_grad()
def apart() -> tuple[float, float]:
    """Mean KL(first‖second) and Jensen-Shannon divergence of the teachers on held-out samples, nats."""
    teachers = Mixture()
    kl, js = [], []
    for ids_1T in held_out():
        one, other = (log_p_1TV[0, :-1] for log_p_1TV in teachers.each(ids_1T))
        mixed = mixed_logs([one, other], WEIGHTS)
        kl.append(float((one.exp() * (one - other)).sum(-1).mean()))
        parts = [float((p.exp() * (p - mixed)).sum(-1).mean()) for p in (one, other)]
        js.append(sum(w * part for w, part in zip(WEIGHTS, parts, strict=True)))
    return statistics.mean(kl), statistics.mean(js)


def main() -> None:
    """Run what is missing, one after the other, and print a table."""
    prepare_stores()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for frozen in (True, False):
        for seed, key in product(SEEDS, _rows(frozen)):
            if result(key, seed) is None:
                subprocess.run([sys.executable, __file__, key, str(seed)], env=environment, check=True)
            print(key, seed, result(key, seed), flush=True)
    rows, claims = [], []
    for frozen in (True, False):
        live, cached = ([result(key, seed) or math.nan for seed in SEEDS] for key in _rows(frozen))
        ratios = [one / other for one, other in zip(cached, live, strict=True)]
        names = [ROWS[key].name for key in _rows(frozen)]
        rows += [[names[0], _spread(live), "1"], [names[1], _spread(cached), _spread(ratios)]]
        within = "yes" if abs(statistics.mean(ratios) - 1) < 0.01 else "**no**"
        claims.append(f"{within} for {names[1]} (by seed {', '.join(f'{ratio:.4f}' for ratio in ratios)})")
    kl, js = apart()
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\nThe mixture is {WEIGHTS[0]} of the first teacher and {WEIGHTS[1]} of the second. On the "
        f"held-out samples the second is {kl:.3f} nats from the first, and their (generalised) Jensen-"
        f"Shannon divergence is {js:.3f} nats. {TRAINED} samples are learned from, in "
        f"{ROWS['live_frozen'].steps} steps with frozen embeddings, and in {ROWS['live'].steps} where all "
        f"weights are trained; {len(SEEDS)} seeds.\n\n"
        + table(["", "held-out KL to the mixture, nats", "of live, by seed"], rows)
        + f"\n\nMean ± standard deviation. Within 1 % of live in held-out KL: {'; '.join(claims)}."
    )
    write_result("mixture_quality", "What a student learns from two teachers: live and cached", body)


def _rows(frozen: bool) -> list[str]:
    """The live one, and the cached one."""
    return [key for key, row in ROWS.items() if row.frozen == frozen]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        main()
