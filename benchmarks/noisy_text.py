"""What `--select` gives where a part of the text cannot be learned: unreadable words.

In the documents of the cache, each word is made unreadable with probability 0.2, as errors of scanning or
encoding leave them: random letters, as many as it had. No run is told which words these are. Students of the
teacher's weights, narrowed to 2 layers of 128, take 80 steps of 2 samples of 128 tokens from it, and are
measured on clean documents that none has seen. All rows of a seed have the start, the samples and their order
in common and take the same steps, so those with `--select` learn from fewer positions.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import tempfile
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

import numpy as np
from common import BIN, RUN, table, write_result
from transformers import AutoTokenizer

from distily import DistillationConfig, DistillationTrainer
from featurestore.format.schema import LogitsFeatures
from featurestore.reader import CacheReader

SEEDS = (0, 1, 2)
LABELS: dict[str, Any] = {"logits_loss": "none", "ce_weight": 1.0}
KEPT = 65  # percent of the positions, of the lowest surprise
ROWS = {
    "labels, all positions": LABELS,
    f"labels, `--select surprise<{KEPT}%`": LABELS | {"select": f"surprise<{KEPT}%"},
}
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CLEAN_DOCUMENTS, SHARE, SAMPLES = 12, 0.2, 180
TRAINING: dict[str, Any] = {
    "max_steps": 80,
    "per_device_train_batch_size": 2,
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
    draw, spoilt = random.Random(0), 0

    def spoil(word: re.Match[str]) -> str:
        nonlocal spoilt
        if draw.random() >= SHARE:
            return word.group()
        spoilt += 1
        return "".join(draw.choices(ascii_lowercase, k=len(word.group())))

    unreadable = [WORD.sub(spoil, text) for text in noisy]
    for name, chosen, flags in (("noisy", unreadable, ("--num-samples", str(SAMPLES))), ("clean", clean, ())):
        data = WORK / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), "utf-8")
        command = [
            *(BIN / "distily-cache", "generate", RUN / "teacher", data, "--out", WORK / name, *flags),
            *("--engine", "transformers", "--dtype", "float32", "--pack", "--max-seq-len", "128"),
        ]
        subprocess.run(command, check=True)
    return spoilt / sum(len(WORD.findall(text)) for text in noisy)


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
        base = measured["labels, all positions"]
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
    share, kept_bad, kept_other = separation()
    body = (
        f"{intro}\n\nOf all words {noise:.0%} are unreadable, which are {share:.0%} of the tokens. The "
        "teacher's surprise does not tell them apart for certain, since it is less sure of what follows "
        f"them, too: `--select` keeps {kept_bad:.0%} of them and {kept_other:.0%} of the others.\n\nThree "
        "seeds; means ± standard deviations, in the last columns of pairs with the same seed (below zero is "
        f"better).\n\n{table(header, rows)}"
    )
    write_result("noisy_text", "Positions selected where a part of the text is noise", body)


def separation() -> tuple[float, float, float]:
    """Shares of the positions: those whose next token is of an unreadable word, those of these that --select
    keeps, and those of the others.
    """
    reader, tokenizer = CacheReader.open(WORK / "noisy"), AutoTokenizer.from_pretrained(RUN / "teacher")
    words = set(WORD.findall((RUN / "topics.jsonl").read_text("utf-8")))
    spec = reader.find_logits()
    surprises, unreadable = [], []
    for index in range(len(reader)):
        sample = reader.read(index, [spec])
        features = sample.features[spec]
        assert isinstance(features, LogitsFeatures)
        surprises.append(-features.label_logprob[:-1])
        pieces = [tokenizer.decode([token]) for token in sample.tokens.tolist()]
        starts, text = np.cumsum([0, *map(len, pieces)]), "".join(pieces)
        bad = np.zeros(len(text), np.bool_)
        for word in WORD.finditer(text):
            bad[word.start() : word.end()] = word.group() not in words
        unreadable.append([bad[a:b].any() for a, b in pairwise(starts[1:])])
    surprise_N, bad_N = np.concatenate(surprises), np.concatenate(unreadable)
    kept_N = surprise_N <= np.quantile(surprise_N, KEPT / 100)
    return float(bad_N.mean()), float(kept_N[bad_N].mean()), float(kept_N[~bad_N].mean())


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def _difference(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
