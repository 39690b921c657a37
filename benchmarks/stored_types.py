"""What a student learns from hidden states, and from the whole distribution, by the type they are stored in.

The same student, samples, order and steps from four caches of one text that differ in nothing but the types
of layer 20 and of the final state. Hidden losses are learned beside the KL of the stored distribution, which
is the same in all caches; `full_kl` alone. All rows go on from one student that has learned the KL before: in
the first steps of a new one, a change of the last digit moves the result more than any type does.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import RUN, generate, table, write_result

from distily import Experiment
from featurestore.reader import CacheReader

SEEDS = tuple(range(int(os.environ.get("SEEDS", "3"))))
BEFORE, STEPS = int(os.environ.get("BEFORE", "240")), int(os.environ.get("STEPS", "60"))
SAMPLES, LENGTH, LAYER, LAYERS, RATE = 160, 128, 20, 3, 5e-4
WORK = RUN / "stored_types"
# Of layer 20 and of the final state; the first ones are what the others are compared with.
TYPES = (("bf16", "bf16"), ("int8", "int8"), ("int4", "klt6"), ("int2", "klt4"))
STATES = {"logits_loss": "kl", "layer_map": f"{LAYER}:2", "hidden_weight": 1.0}
LOSSES: dict[str, dict[str, Any]] = {
    "`kl` and `hidden_nmse`": STATES | {"hidden_loss": "nmse"},
    "`kl` and `hidden_cosine`": STATES | {"hidden_loss": "cosine"},
    "`full_kl`": {"logits_loss": "full_kl"},
}


def capture(hidden: str, final: str) -> Path:
    """A cache with these types."""
    store = WORK / f"{hidden}-{final}"
    generate(
        store,
        *("--dtype", "float32", "--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES),
        *("--hidden-layers", LAYER, "--hidden-dtype", hidden, "--final", "--final-dtype", final),
    )
    return store


def train(store: Path, out: str, seed: int, steps: int, **flags: Any) -> dict[str, float]:
    """Held-out metrics of a run."""
    experiment = Experiment(
        str(store),
        out,
        freeze_embeddings=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=1,
        save_strategy="no",
        max_steps=steps,
        eval_steps=steps,
        eval_on_start=False,
        eval_fraction=0.2,
        disable_tqdm=True,
        seed=seed,
        **flags,
    )
    metrics: dict[str, float] = experiment.train()["last_eval"]
    return metrics


def start(store: Path) -> Path:
    """The student that all rows go on from."""
    student = WORK / f"student-{BEFORE}"
    if not student.is_dir():
        with tempfile.TemporaryDirectory(dir=WORK) as out:
            shape = {"num_hidden_layers": LAYERS}
            train(store, out, len(SEEDS), BEFORE, student_model_config=shape, learning_rate=1e-3)
            Path(out).rename(student)
            Path(out).mkdir()
    return student


def learn(store: Path, loss: str, seed: int) -> dict[str, float]:
    """Held-out metrics of one row, kept, so that the study resumes."""
    file = WORK / f"{store.name}-{list(LOSSES).index(loss)}-{seed}.json"
    settings = {
        "manifest": CacheReader.open(store).manifest_digest,
        "steps": [BEFORE, STEPS],
        "rate": RATE,
        "flags": LOSSES[loss],
    }
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        student = str(start(WORK / "-".join(TYPES[0])))
        with tempfile.TemporaryDirectory() as out:
            metrics = train(store, out, seed, STEPS, student=student, learning_rate=RATE, **LOSSES[loss])
        found = {"settings": settings, "metrics": metrics}
        file.write_text(json.dumps(found))
    print(store.name, loss, seed, found["metrics"]["eval_kl"], flush=True)
    return dict(found["metrics"])


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    stores = {types: capture(*types) for types in TYPES}
    rows = []
    for loss in LOSSES:
        base = [learn(stores[TYPES[0]], loss, seed)["eval_kl"] for seed in SEEDS]
        for types in TYPES:
            found = [learn(stores[types], loss, seed)["eval_kl"] for seed in SEEDS]
            gaps = [one - other for one, other in zip(found, base, strict=True)]
            stored = types[loss == "`full_kl`"]
            rows.append([loss, stored, _spread(found), "–" if types == TYPES[0] else f"{_spread(gaps, '+')}"])
    about = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{about}\n\nThe student has {LAYERS} layers of the demo teacher, embeddings frozen, and has learned "
        f"the KL for {BEFORE} steps. Each row takes {STEPS} more, of one sample of {LENGTH} tokens, float32 "
        f"and a rate of {RATE}; {len(SEEDS)} seeds choose the order of the samples. Layer {LAYER} is paired "
        "with the output of the student's second layer. Held-out KL in nats, mean ± standard deviation; the "
        "last column is of pairs with the same seed. The spread of the first row of each loss is what the "
        "order of the samples alone does.\n\n"
        + table(["loss", "stored as", "held-out KL", "against bf16"], rows)
    )
    write_result("stored_types", "What a student learns, by the type its teacher is stored in", body)


def _spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
