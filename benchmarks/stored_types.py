"""What a student learns from hidden states, and from the whole distribution, by the type they are stored in.

The same student, samples, order and steps from four caches of one text that differ in nothing but the types
of layer 20 and of the final state. Hidden losses are learned beside the KL of the stored distribution, which
is the same in all caches; `full_kl` alone.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import BIN, RUN, table, write_result

from distily import Experiment
from featurestore.reader import CacheReader

SEEDS = tuple(range(int(os.environ.get("SEEDS", "3"))))
STEPS = int(os.environ.get("STEPS", "80"))
SAMPLES, LENGTH, LAYER, WORK = 160, 128, 20, RUN / "stored_types"
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
    command = [
        *(BIN / "distily-cache", "generate", RUN / "teacher", RUN / "topics.jsonl", "--out", store),
        *("--engine", "transformers", "--dtype", "float32", "--pack", "--max-seq-len", str(LENGTH)),
        *("--num-samples", str(SAMPLES), "--hidden-layers", str(LAYER), "--hidden-dtype", hidden),
        *("--final", "--final-dtype", final),
    ]
    subprocess.run(command, check=True)
    return store


def learn(store: Path, loss: str, seed: int) -> dict[str, float]:
    """Held-out metrics of one run, kept, so that the study resumes."""
    file = WORK / f"{store.name}-{list(LOSSES).index(loss)}-{seed}.json"
    settings = {"manifest": CacheReader.open(store).manifest_digest, "steps": STEPS, "flags": LOSSES[loss]}
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        out = tempfile.mkdtemp()
        experiment = Experiment(
            str(store),
            out,
            student_model_config={"num_hidden_layers": 3},
            freeze_embeddings=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            save_strategy="no",
            max_steps=STEPS,
            eval_steps=STEPS,
            eval_on_start=False,
            eval_fraction=0.2,
            disable_tqdm=True,
            seed=seed,
            **LOSSES[loss],
        )
        found = {"settings": settings, "metrics": experiment.train()["last_eval"]}
        shutil.rmtree(out)
        file.write_text(json.dumps(found))
    metrics: dict[str, float] = found["metrics"]
    print(store.name, loss, seed, metrics["eval_kl"], flush=True)
    return metrics


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
    body = (
        f"A student of 3 layers of the demo teacher, embeddings frozen, {STEPS} steps of one sample of "
        f"{LENGTH} tokens in float32, {len(SEEDS)} seeds, which choose the order of the samples; layer "
        f"{LAYER} is paired with the output of its second layer. Held-out KL in nats, mean ± standard "
        "deviation; the last column is of pairs with the same seed. The spread of the first row of each loss "
        "is what the order of the samples alone does.\n\n"
        + table(["loss", "stored as", "held-out KL", "against bf16"], rows)
    )
    write_result("stored_types", "What a student learns, by the type its teacher is stored in", body)


def _spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
