"""What a student learns from two cached teachers, mixed, and from both teachers themselves.

The teachers are the demo teacher and a copy of it that was fine-tuned on the first half of the demo text by
plain transformers. A student of 3 layers and a third of their width, of the demo teacher's weights narrowed,
learns from their mixture (samples of 128 tokens; float32, AdamW, cosine), or from the first teacher alone.
Its embeddings, which are also its LM head, stay as they are, or all weights are trained. A further student
has the teacher's width and starts with its embeddings, which are trained, too. For one seed the rows of a
group see the same batches in the same order, from the same initial weights; the seed chooses the order. The
cached rows are what `distily-train from-cache` does with its flags on the stores of
`distily-cache generate`: `--tail` takes the first 16 or all 64 of the stored draws. The row of final states
has an objective of one `full_kl` for each teacher, which reads no draws. The live rows are the same request,
planned and trained by the same code, with the loss swapped for the KL over the whole vocabulary from the
exact distribution: the teachers' final states of each sample, in float32, times their LM heads.

What is compared is no loss of any row: KL(teachers‖student) in nats over the whole vocabulary, in float32, on
samples that no student has learned from.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUN, generate, table, write_result
from shifted_teacher import shifted_teacher
from torch import Tensor

from featurestore.format.schema import HiddenFeatures, HiddenSpec
from featurestore.reader import CachedSample, CacheReader
from student.config.parser import parse
from student.data.batches import IGNORE
from student.data.mixture import mixed_logs
from student.data.teacher_weights import load_parts
from student.training.model import DistillationModel
from student.training.plan import plan_split
from student.training.run import assemble, prepare
from student.training.trainer import CacheTrainer

SEEDS = range(int(os.environ.get("SEEDS", "3")))
LENGTH = 128
SAMPLES, TRAINED = 290, 220  # in the stores; that are learned from, as often as the steps take
MEASURED = 24  # of the others
DRAWS = 64  # in the stores
WEIGHTS, HELD_OUT = (0.6, 0.4), 0.1
FINAL = HiddenSpec(30, "f32")
NARROW = {
    "num_hidden_layers": 3,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
WORK = RUN / "mixture"
STORES = (WORK / "first", WORK / "second")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to learn.

    weights: shares of the teachers; one for the first alone. frozen: whether the student's embeddings, which
    are its LM head, stay as they are. wide: whether it has the teacher's width and starts with its
    embeddings. batch: samples of a step. draws: of each teacher and position that are learned from; 0: none,
    but the final states; None: live.
    """

    weights: tuple[float, ...] = WEIGHTS
    frozen: bool = False
    wide: bool = False
    steps: int
    batch: int
    draws: int | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """What the rows that are compared share."""
        return self.weights, self.frozen, self.wide, self.steps, self.batch

    @property
    def shape(self) -> dict[str, int]:
        """The student's."""
        return {"num_hidden_layers": 3} if self.wide else NARROW

    @property
    def rate(self) -> str:
        """Where the embeddings are the teacher's, that of from-cache by default."""
        return "4e-4" if self.wide else "2e-3"

    @property
    def name(self) -> str:
        """`two caches, 16 draws`."""
        one = len(self.weights) == 1
        if self.draws is None:
            return "one teacher live" if one else "both teachers live"
        caches = "one cache" if one else "two caches"
        return f"{caches}, {self.draws} draws" if self.draws else f"{caches}, `--final`"


ROWS = {
    f"{name}{key}": replace(row, draws=draws)
    for name, row, choices in (
        ("frozen", Row(frozen=True, steps=100, batch=1), (None, 16)),
        ("one", Row(weights=(1.0,), steps=100, batch=1), (None, 16)),
        ("both", Row(steps=100, batch=1), (None, 16, 64, 0)),
        ("batch", Row(steps=50, batch=4), (None, 16, 64)),
        ("large", Row(steps=30, batch=16), (None, 16)),
        ("wide", Row(wide=True, steps=100, batch=1), (None, 16)),
    )
    for draws in choices
    for key in ["" if draws is None else f"-{draws}"]
}


class Teachers:
    """Both teachers' exact distributions at the positions of known samples.

    From final states and LM heads; what was asked for is kept in files, 25 MB for each sample.
    """

    def __init__(self) -> None:
        self._states: list[dict[bytes, Tensor]] = []
        self._heads: list[Tensor] = []
        for store in STORES:
            reader = CacheReader.open(store)
            read = [reader.read(index, [FINAL]) for index in range(len(reader))]
            self._states.append({_key(one.tokens): _states(one) for one in read})
            head = load_parts(reader, True, ()).head
            assert head is not None
            self._heads.append(head.weight_VD.float())
        self._kept = WORK / "logs"
        self._kept.mkdir(exist_ok=True)

    def each(self, sample: bytes) -> list[Tensor]:
        """log p of each teacher, float32 [T, V]."""
        pairs = zip(self._states, self._heads, strict=True)
        return [(states[sample] @ head.t()).log_softmax(-1) for states, head in pairs]

    def logs(self, sample: bytes, weights: tuple[float, ...]) -> Tensor:
        """log p of the mixture, float32 [T, V], in a file that is mapped."""
        name = sha256(repr((sample, weights, manifests())).encode()).hexdigest()[:32]
        file = self._kept / f"{name}.npy"
        if not file.is_file():
            partial = self._kept / f"{name}-{os.getpid()}.npy"
            np.save(partial, mixed_logs(self.each(sample)[: len(weights)], weights).numpy())
            partial.rename(file)
        return torch.from_numpy(np.load(file, mmap_mode="c"))


def _key(ids_T: Any) -> bytes:
    """The name of a sample, of its tokens in either library."""
    return np.asarray(ids_T, np.int64).tobytes()


def _states(sample: CachedSample) -> Tensor:
    """float32 [T, D], read-only."""
    features = sample.features[FINAL]
    assert isinstance(features, HiddenFeatures)
    return torch.from_numpy(features.values)


class LiveTeachers(DistillationModel):
    """KL over the whole vocabulary from the teachers' mixture."""

    def __init__(self, planned: DistillationModel, teachers: Teachers, weights: tuple[float, ...]) -> None:
        super().__init__(planned.student, planned.objective)
        self._live, self._mixed_by = teachers, weights

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> dict[str, Tensor]:
        if not self.training:  # what the product measures on its way is no part of the study
            return super().forward(input_ids, labels, **rest)
        learned = labels != IGNORE
        wanted = torch.stack([self._live.logs(_key(ids_T), self._mixed_by) for ids_T in input_ids])[learned]
        own = self.student(input_ids=input_ids, use_cache=False).logits[learned].log_softmax(-1)
        total = torch.nn.functional.kl_div(own, wanted, log_target=True, reduction="sum")
        loss = total / rest["num_items_in_batch"]
        return {"loss": loss, "terms": loss.detach().unsqueeze(0)}


@torch.no_grad()
def measure(student: Any, teachers: Teachers, weights: tuple[float, ...]) -> list[float]:
    """KL from the mixture of each held-out sample, nats per position, over the whole vocabulary."""
    found = []
    for ids_1T in held_out():
        log_p_TV = teachers.logs(_key(ids_1T[0]), weights)[:-1]
        log_q_TV = student(input_ids=ids_1T, use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean()))
    return found


@cache
def held_out() -> list[Tensor]:
    """Tokens [1, T] of MEASURED samples that are not learned from, spread evenly over these."""
    reader = CacheReader.open(STORES[0])
    trained = set(plan_split(reader, HELD_OUT, TRAINED).training)
    others = [index for index in range(len(reader)) if index not in trained]
    chosen = [others[len(others) * place // MEASURED] for place in range(MEASURED)]
    return [torch.from_numpy(reader.read(index, []).tokens).long()[None] for index in chosen]


def flags(row: Row, seed: int, out: str) -> list[str]:
    """Of from-cache."""
    several = len(row.weights) > 1
    asked = [
        *map(str, STORES if several else STORES[:1]),
        *("--output-dir", out, "--seed", str(seed), "--max-steps", str(row.steps)),
        *("--student-model-config", json.dumps(row.shape), "--teacher", str(RUN / "teacher"), "--no-bf16"),
        *(
            "--per-device-train-batch-size",
            str(row.batch),
            "--learning-rate",
            row.rate,
            "--save-strategy",
            "no",
        ),
        *("--eval-fraction", str(HELD_OUT), "--train-samples", str(TRAINED), "--eval-strategy", "no"),
        *("--freeze-embeddings", str(row.frozen)),
    ]
    if row.draws == 0:
        terms = [
            {"loss": "full_kl", "weight": weight, "teacher": number}
            for number, weight in enumerate(row.weights)
        ]
        objective = Path(out) / "objective.json"
        objective.write_text(json.dumps({"terms": terms}))
        return [*asked, "--objective", str(objective)]
    draws = ["--tail", str(row.draws)] if row.draws else []
    return [*asked, *draws, *(["--teacher-weights", ",".join(map(str, row.weights))] if several else [])]


def train(row: Row, seed: int, teachers: Teachers) -> Any:
    """The student that a row makes."""
    with tempfile.TemporaryDirectory() as out:
        assembled = assemble(prepare(parse(flags(row, seed, out))))
        model = assembled.model
        if row.draws is None:
            model = LiveTeachers(model, teachers, row.weights)
        CacheTrainer(**assembled.for_trainer() | {"model": model}).train()
    return model.student.eval()


def run(key: str, seed: int, teachers: Teachers) -> None:
    """One row with one seed; leaves its result beside the others."""
    row = ROWS[key]
    found = {"settings": settings(row), "kl": measure(train(row, seed, teachers), teachers, row.weights)}
    partial = result_file(key, seed).with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(result_file(key, seed))


@cache
def manifests() -> list[str]:
    """What the stores hold."""
    return [CacheReader.open(store).manifest_digest for store in STORES]


def settings(row: Row) -> dict[str, Any]:
    """What makes results comparable."""
    own = {name: value for name, value in asdict(row).items() if name not in ("wide", "weights")}
    own |= {"weights": list(row.weights), "shape": row.shape, "rate": row.rate}
    return {"manifests": manifests(), "trained": TRAINED, "measured": MEASURED} | own


def result_file(key: str, seed: int) -> Path:
    return WORK / f"{key}-{seed}.json"


def result(key: str, seed: int) -> list[float] | None:
    """The KL of each held-out sample that a run has come to; None where it has not ended yet or had other
    settings.
    """
    file = result_file(key, seed)
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found["kl"] if found.get("settings") == settings(ROWS[key]) else None


def prepare_stores() -> None:
    """A store of each teacher: head, draws, and final states in float32."""
    for seed, (teacher, store) in enumerate(zip((RUN / "teacher", shifted_teacher()), STORES, strict=True)):
        flags = ["--dtype", "float32", "--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES]
        flags += ["--top-k", 12, "--top-p", 0.7, "--tail", DRAWS, "--final", "--hidden-dtype", "f32"]
        generate(store, *flags, "--seed", seed, teacher=teacher)


def apart(teachers: Teachers) -> tuple[float, float]:
    """Mean KL(first‖second) and Jensen-Shannon divergence of the teachers on held-out samples, nats."""
    kl, js = [], []
    for ids_1T in held_out():
        one, other = (log_p_TV[:-1] for log_p_TV in teachers.each(_key(ids_1T[0])))
        mixed = mixed_logs([one, other], WEIGHTS)
        kl.append(float((one.exp() * (one - other)).sum(-1).mean()))
        parts = [float((p.exp() * (p - mixed)).sum(-1).mean()) for p in (one, other)]
        js.append(sum(w * part for w, part in zip(WEIGHTS, parts, strict=True)))
    return statistics.mean(kl), statistics.mean(js)


def report() -> str:
    """The table of the runs that have ended. Each ratio is taken within a seed."""
    lines = []
    for (_, frozen, wide, steps, batch), group in groupby(ROWS, lambda key: ROWS[key].group):
        keys = list(group)
        live = [result(keys[0], seed) for seed in SEEDS]
        for key in keys:
            pairs = [(result(key, seed), other) for seed, other in enumerate(live)]
            known = [(statistics.mean(one), statistics.mean(other)) for one, other in pairs if one and other]
            if not known:
                continue
            ratios = [one / other for one, other in known]
            lines.append(
                [
                    "frozen" if frozen else "trained, the teacher's" if wide else "trained",
                    f"{steps} × {batch}",
                    ROWS[key].name,
                    _spread([one for one, _ in known]),
                    "1" if key == keys[0] else f"{_spread(ratios)} ({len(ratios)})",
                    "" if key == keys[0] else "yes" if abs(statistics.mean(ratios) - 1) < 0.01 else "**no**",
                ]
            )
    header = ["embeddings and LM head", "steps × samples", "learns from", "held-out KL, nats"]
    return table([*header, "of live (seeds)", "within 1 %"], lines)


def main() -> None:
    """Run what is missing of all rows, or of those that the command names; print a table of all results."""
    prepare_stores()
    teachers = Teachers()
    for seed in SEEDS:
        for key in sys.argv[1:] or ROWS:
            if result(key, seed) is None:
                run(key, seed, teachers)
            print(key, seed, statistics.mean(result(key, seed) or [math.nan]), flush=True)
    kl, js = apart(teachers)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\nThe mixture is {WEIGHTS[0]} of the first teacher and {WEIGHTS[1]} of the second. On the "
        f"held-out samples the second is {kl:.3f} nats from the first, and their (generalised) Jensen-"
        f"Shannon divergence is {js:.3f} nats. {TRAINED} samples are learned from; {MEASURED} others are "
        f"measured, {MEASURED * (LENGTH - 1):,} positions.\n\n{report()}\n\nMean ± standard deviation over "
        "the seeds, whose number is in brackets. Draws and held-out samples are the same in each seed."
    )
    write_result("mixture_quality", "What a student learns from two teachers: live and cached", body)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
