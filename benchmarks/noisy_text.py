"""What `--select` gives where a part of the text cannot be learned: words that were swapped.

In every second document, each word is exchanged with probability 0.5 for one drawn from the distinct words of
the text. The cache is of that text, and no run is told which words are noise. Students of the teacher's
weights, narrowed to 2 layers of 128, take 60 steps of 4 samples of 128 tokens from it, and are measured on
clean documents that none has seen. All rows of a seed have the start, the samples and their order in common
and take the same steps, so those with `--select` learn from fewer positions.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import tempfile
from typing import Any

from common import BIN, RUN, table, write_result

from distily import DistillationConfig, DistillationTrainer
from featurestore.reader import CacheReader

SEEDS = (0, 1, 2)
KL: dict[str, Any] = {"logits_loss": "kl"}
LABELS: dict[str, Any] = {"logits_loss": "none", "ce_weight": 1.0}
ROWS = {
    "labels, all positions": LABELS,
    "labels, `--select surprise<70%`": LABELS | {"select": "surprise<70%"},
    "KL, all positions": KL,
    "KL, `--select surprise<70%`": KL | {"select": "surprise<70%"},
    "KL, `--select entropy<70%`": KL | {"select": "entropy<70%"},
}
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CLEAN_DOCUMENTS, SHARE, SAMPLES = 12, 0.5, 400
TRAINING: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "learning_rate": 4e-3,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
WORK = RUN / "noisy"
WORD = re.compile(r"[A-Za-z]+")

Metrics = dict[str, float]


def capture() -> float:
    """Caches of noisy and of clean documents, which are the last ones; the share of words that are noise."""
    WORK.mkdir(exist_ok=True)
    texts = [json.loads(line)["text"] for line in (RUN / "topics.jsonl").read_text("utf-8").splitlines()]
    clean, noisy = texts[-CLEAN_DOCUMENTS:], texts[:-CLEAN_DOCUMENTS]
    words = sorted({word for text in noisy for word in WORD.findall(text)})
    draw, swapped = random.Random(0), 0

    def swap(word: re.Match[str]) -> str:
        nonlocal swapped
        if draw.random() >= SHARE:
            return word.group()
        swapped += 1
        return draw.choice(words)

    spoilt = [WORD.sub(swap, text) if number % 2 else text for number, text in enumerate(noisy)]
    for name, chosen, flags in (("noisy", spoilt, ("--num-samples", str(SAMPLES))), ("clean", clean, ())):
        data = WORK / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), "utf-8")
        command = [
            *(BIN / "distily-cache", "generate", RUN / "teacher", data, "--out", WORK / name, *flags),
            *("--engine", "transformers", "--dtype", "float32", "--pack", "--max-seq-len", "128"),
        ]
        subprocess.run(command, check=True)
    return swapped / sum(len(WORD.findall(text)) for text in noisy)


def learn(flags: dict[str, Any], seed: int) -> Metrics:
    """KL and perplexity on the clean documents of a run on the noisy ones."""
    with tempfile.TemporaryDirectory() as out:
        args = DistillationConfig(output_dir=out, student_model_config=SHAPE, seed=seed, **(TRAINING | flags))
        trainer = DistillationTrainer(
            args=args, train_dataset=str(WORK / "noisy"), eval_dataset=str(WORK / "clean")
        )
        trainer.train()
        found = trainer.evaluate()
    return {name: float(found[f"eval_{name}"]) for name in ("kl", "perplexity")}


def result(row: str, seed: int) -> Metrics:
    """Of one run, kept, so that the study resumes."""
    file = WORK / f"{list(ROWS).index(row)}-{seed}.json"
    manifests = [CacheReader.open(WORK / name).manifest_digest for name in ("noisy", "clean")]
    settings = {"manifests": manifests, "flags": TRAINING | ROWS[row], "shape": SHAPE}
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "metrics": learn(ROWS[row], seed)}
        file.write_text(json.dumps(found))
    print(seed, row, found["metrics"], flush=True)
    metrics: Metrics = found["metrics"]
    return metrics


def main() -> None:
    noise = capture()
    measured = {row: [result(row, seed) for seed in SEEDS] for row in ROWS}
    rows = []
    for row, found in measured.items():
        base = measured["KL, all positions" if row.startswith("KL") else "labels, all positions"]
        pairs = list(zip(found, base, strict=True))
        gained = (
            [one["kl"] - other["kl"] for one, other in pairs],
            [100 * (one["perplexity"] / other["perplexity"] - 1) for one, other in pairs],
        )
        cells = [_spread([one[column] for one in found]) for column in ("kl", "perplexity")]
        cells += ["–"] * 2 if found is base else [_difference(values) for values in gained]
        rows.append([row, *cells])
    header = [
        *("objective and positions", "KL", "perplexity"),
        *("KL against all positions", "perplexity against all positions, %"),
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\nOf all words {noise:.0%} are noise. Three seeds; means ± standard deviations, in the "
        f"last columns of pairs with the same seed (below zero is better).\n\n{table(header, rows)}"
    )
    write_result("noisy_text", "Positions selected where a part of the text is noise", body)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def _difference(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
