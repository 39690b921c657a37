"""What `--select` gives in equal processor time: steps on fewer positions are cheaper, so there are more.

The LM head is multiplied at learned positions only, and for a small student it is most of a step. Two layers
copied from the teacher, with its embeddings and head, which stay as they are, learn the KL from samples of
256 tokens, one a step: the smallest batch that there is, with which learning from all positions takes the
most steps. Rows take the processor time of 80 steps on all positions, by what a step of each was measured to
take; one takes as many steps instead. A random share of the positions shows what the saved time gives without
any measure.

Pilots: one seed; the samples that `--eval-fraction 0.2` trains on, measured on documents that it holds out
and `--eval-fraction 0.12` does not. What is confirmed was chosen by them, and learns, with other seeds, from
what `--eval-fraction 0.12` trains on, measured on what it holds out: documents that no pilot has seen.

    python benchmarks/selected_time.py          # what has not run yet, and the page
    python benchmarks/selected_time.py pilots   # those alone
    python benchmarks/selected_time.py found    # the page of what has run
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from common import RUN, table, write_result
from transformers import TrainerCallback

from distily import DistillationConfig, DistillationTrainer
from featurestore.reader import CacheReader
from student.data.batches import CachedDataset
from student.data.held_out import split_cache
from student.training.trainer import held_out_metrics

CACHE = RUN / "ternary" / "cache"
WORK = RUN / "selected_time"
RUNS = WORK / "runs.jsonl"
PILOT_SEED, SEEDS = 100, range(5)
PILOT_SHARE, SHARE = 0.2, 0.12  # --eval-fraction; what the second holds out the first does, too
EVERY = 4  # of the pilots' held-out samples
TRAINING: dict[str, Any] = {
    "student_model_config": {"num_hidden_layers": 2},
    "copy_layers": "0,1",
    "freeze_embeddings": True,
    "per_device_train_batch_size": 1,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to learn, and its peak learning rate."""

    steps: int
    select: str | None = None
    rate: float = 4e-3

    def __str__(self) -> str:
        return "all positions" if self.select is None else f"`--select {self.select}`"


PILOTS = (
    Row(steps=80),
    Row(steps=80, rate=2e-3),
    Row(steps=80, rate=8e-3),
    Row(steps=121, select="random<50%"),
    Row(steps=154, select="random<25%"),
    Row(steps=121, select="entropy>50%"),
    Row(steps=121, select="entropy<50%"),
    Row(steps=121, select="entropy>50%", rate=2e-3),
    Row(steps=121, select="surprise>50%", rate=2e-3),
    Row(steps=154, select="entropy>75%", rate=2e-3),
)
CONFIRMED = (
    Row(steps=80),
    Row(steps=154, select="random<25%"),
    Row(steps=121, select="random<50%"),
    Row(steps=121, select="entropy>50%"),
    Row(steps=80, select="random<25%"),  # as many steps as on all positions, in about half of the time
)
Found = dict[str, float]


class Clock(TrainerCallback):  # type: ignore[misc]
    """Processor time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())


def learn(row: Row, seed: int, pilot: bool) -> Found:
    """Held-out metrics over all positions, and the processor time that the training took, in seconds."""
    given = {} if row.select is None else {"select": row.select}
    began, clock = time.process_time(), Clock()
    with tempfile.TemporaryDirectory() as out:
        args = DistillationConfig(
            output_dir=out,
            seed=seed,
            max_steps=row.steps,
            learning_rate=row.rate,
            eval_fraction=PILOT_SHARE if pilot else SHARE,
            **given,
            **TRAINING,
        )
        trainer = DistillationTrainer(args=args, train_dataset=str(CACHE), callbacks=[clock])
        trainer.train()
        took = time.process_time() - began
        if pilot:
            _measure_on_pilots_documents(trainer)
        metrics = trainer.evaluate()
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    names = ("kl", "kl_se", "perplexity", "top1_agreement")
    found = {name: float(metrics[f"eval_{name}"]) for name in names}
    return found | {"seconds": took, "step": statistics.median(steps)}


def _measure_on_pilots_documents(trainer: DistillationTrainer) -> None:
    """Held out are samples that may be trained on when it is confirmed."""
    reader = CacheReader.open(CACHE)
    confirmed, split = set(split_cache(reader, SHARE).training), split_cache(reader, PILOT_SHARE)
    places = [place for place, index in enumerate(split.held_out) if index in confirmed][::EVERY]
    trainer.eval_dataset = CachedDataset(
        reader, [split.held_out[place] for place in places], trainer.eval_dataset.groups
    )
    documents = [split.held_out_documents[place] for place in places]
    trainer.compute_metrics = partial(held_out_metrics, documents)


def result(row: Row, seed: int, pilot: bool) -> None:
    """One run, unless it has run; kept, so that the study resumes."""
    if key(row, seed, pilot) not in kept():
        found = learn(row, seed, pilot)
        WORK.mkdir(exist_ok=True)
        with RUNS.open("a") as file:
            file.write(json.dumps({"key": key(row, seed, pilot), "found": found}) + "\n")
        print(row, row.steps, row.rate, seed, found, flush=True)


def kept() -> dict[str, Found]:
    """What has run, by key."""
    lines = RUNS.read_text().splitlines() if RUNS.is_file() else []
    return {one["key"]: one["found"] for one in map(json.loads, lines)}


def key(row: Row, seed: int, pilot: bool) -> str:
    """What a run's result follows from."""
    told = {"manifest": CacheReader.open(CACHE).manifest_digest, "seed": seed, "pilot": pilot}
    return json.dumps(told | asdict(row) | TRAINING, sort_keys=True)


def compare(rows: Sequence[Row], seeds: Sequence[int], pilot: bool) -> list[list[str]]:
    """Lines of a table: what has run, against the first row of the same seed."""
    known = kept()
    found = [{seed: known.get(key(row, seed, pilot)) for seed in seeds} for row in rows]
    lines = []
    for row, by_seed in zip(rows, found, strict=True):
        ran = {seed: one for seed, one in by_seed.items() if one is not None}
        if not ran:
            continue
        apart = [one["kl"] - first["kl"] for seed, one in ran.items() if (first := found[0][seed])]
        values = {name: [one[name] for one in ran.values()] for name in next(iter(ran.values()))}
        lines.append(
            [
                *(str(row), f"{row.rate:g}", str(row.steps)),
                f"{statistics.median(values['step']):.3f}",
                spread(values["seconds"], ".1f"),
                spread(values["kl"], ".3f"),
                spread(values["perplexity"], ".0f"),
                "–" if row is rows[0] else spread(apart, "+.3f"),
            ]
        )
        if not pilot:
            lines[-1].append(str(len(ran)))
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the value where there is but one."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


def write() -> None:
    """The page of what has run."""
    header = [
        *("positions", "rate", "steps", "s per step", "s in all", "held-out KL", "perplexity"),
        "KL against all positions",
    ]
    intro = (__doc__ or "").split("\n", 2)[2].rsplit("\n\n", 1)[0].strip()
    confirmed, pilots = compare(CONFIRMED, SEEDS, pilot=False), compare(PILOTS, [PILOT_SEED], pilot=True)
    body = (
        f"{intro}\n\n## Confirmed\n\nMeans ± standard deviations over seeds; in the last column but one of "
        "pairs with the same seed, below zero is better. Seconds are of the processor, one thread, without "
        f"evaluation.\n\n{table([*header, 'seeds'], confirmed)}\n\n## Pilots\n\nAll that were run, one seed, "
        "on other documents than those above, with which their KLs do not compare. One more learned 25% drawn "
        "anew in each step, at a rate of 2e-3, and came to 3.546; three were stopped before they ended."
        f"\n\n{table(header, pilots)}"
    )
    write_result("selected_time", "Positions selected for a training in equal time", body)


def main() -> None:
    asked = sys.argv[1:]
    torch.set_num_threads(1)
    if asked != ["found"]:
        for row in PILOTS:
            result(row, PILOT_SEED, pilot=True)
    if not asked:
        for seed in SEEDS:
            for row in CONFIRMED:
                result(row, seed, pilot=False)
    write()


if __name__ == "__main__":
    main()
