"""The same small student, samples, steps and seeds: from all positions alike, and with `--select` and
`--weight` by what the cache knows of them; on clean text, and on text in which words were swapped.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BIN, RUN, table, train, write_result

SEEDS = (0, 1, 2)
KL, LABELS = ("--logits-loss", "kl"), ("--logits-loss", "none", "--ce-weight", "1")
RUNS: dict[str, tuple[str, ...]] = {
    "KL, all positions": KL,
    "KL, `--select surprise<80%`": (*KL, "--select", "surprise<80%"),
    "KL, `--weight entropy`": (*KL, "--weight", "entropy"),
    "labels, all positions": LABELS,
    "labels, `--select surprise<80%`": (*LABELS, "--select", "surprise<80%"),
}
NOISY_RUNS: dict[str, tuple[str, ...]] = {
    "KL, all positions": KL,
    "KL, `--select surprise<75%`": (*KL, "--select", "surprise<75%"),
    "KL, `--select entropy<75%`": (*KL, "--select", "entropy<75%"),
    "labels, all positions": LABELS,
    "labels, `--select surprise<75%`": (*LABELS, "--select", "surprise<75%"),
}
SHAPE = (
    '{"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3, '
    '"num_key_value_heads": 3, "head_dim": 32}'
)
NARROWED = (
    '{"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2, '
    '"num_key_value_heads": 1, "head_dim": 64}'
)
COMMON = ("--no-bf16", "--report-to", "none", "--quiet", "--save-strategy", "no")
TRAINING = ("--per-device-train-batch-size", "4", "--learning-rate", "4e-3", "--eval-on-start", "False")
STUDENT = ("--student-model-config", SHAPE, "--init", "random")
STEPS = ("--max-steps", "24", "--eval-steps", "24")
CLEAN_DOCUMENTS = 12  # the last ones of the demo text, held out
SHARE = 0.5  # of the documents have swapped words, and of their words so many are swapped
WORK = RUN / "curriculum"

Metrics = dict[str, float]


def on_clean_text(flags: tuple[str, ...], seed: int) -> Metrics:
    """Held-out KL and perplexity of a run on the quickstart's cache."""
    with tempfile.TemporaryDirectory() as out:
        options = (*STUDENT, *COMMON, *TRAINING, *STEPS, *flags, "--seed", str(seed))
        found = train(Path(out), *options)["last_eval"]
    return {name: found[f"eval_{name}"] for name in ("kl", "perplexity")}


def on_noisy_text(flags: tuple[str, ...], seed: int) -> Metrics:
    """KL and perplexity on clean documents of a run on the noisy ones."""
    steps = ("--max-steps", "100", "--eval-fraction", "0", "--teacher", str(RUN / "teacher"))
    options = ("--student-model-config", NARROWED, *COMMON, *TRAINING, *steps, *flags, "--seed", str(seed))
    with tempfile.TemporaryDirectory() as out:
        train(Path(out), *options, cache=WORK / "noisy")
        command = [BIN / "distily-train", "eval", out, "--cache", WORK / "clean", "--all-samples", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["cache"]["student"]
    return {name: float(found[name]) for name in ("kl", "perplexity")}


def capture() -> str:
    """Caches of noisy and of clean documents; what was done to the text, in a sentence."""
    WORK.mkdir(exist_ok=True)
    texts = [json.loads(line)["text"] for line in (RUN / "topics.jsonl").read_text("utf-8").splitlines()]
    clean, noisy = texts[-CLEAN_DOCUMENTS:], texts[:-CLEAN_DOCUMENTS]
    words = sorted({word for text in noisy for word in re.findall(r"[A-Za-z]+", text)})
    draw, swapped, seen = random.Random(0), 0, 0

    def swap(_: re.Match[str]) -> str:
        nonlocal swapped, seen
        take = draw.random() < SHARE
        swapped, seen = swapped + take, seen + 1
        return draw.choice(words) if take else _.group()

    spoilt = [re.sub(r"[A-Za-z]+", swap, text) if number % 2 else text for number, text in enumerate(noisy)]
    total = sum(len(re.findall(r"[A-Za-z]+", text)) for text in noisy)
    for name, chosen in (("noisy", spoilt), ("clean", clean)):
        data = WORK / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), "utf-8")
        command = [
            *(BIN / "distily-cache", "generate", RUN / "teacher", data, "--out", WORK / name),
            *("--engine", "transformers", "--dtype", "float32", "--pack", "--max-seq-len", "128"),
        ]
        subprocess.run(command, check=True)
    return (
        f"In every second of {len(noisy)} documents, each word was exchanged with probability {SHARE:g} for "
        f"one drawn from the {len(words):,} distinct words of the text, so that {swapped / total:.0%} of all "
        "words are noise."
    )


def measure(
    name: str, runs: dict[str, tuple[str, ...]], once: Callable[[tuple[str, ...], int], Metrics]
) -> str:
    """A table of all runs; what they come to is kept, so that the study resumes."""
    measured: dict[str, list[Metrics]] = {}
    for seed in SEEDS:
        for number, (row, flags) in enumerate(runs.items()):
            file = WORK / f"{name}-{number}-{seed}.json"
            found = json.loads(file.read_text()) if file.is_file() else {}
            if found.get("flags") != list(flags):
                found = {"flags": flags, **once(flags, seed)}
                file.write_text(json.dumps(found))
            measured.setdefault(row, []).append(found)
            print(seed, row, found, flush=True)
    rows = []
    for row, found_S in measured.items():
        base = measured["KL, all positions" if row.startswith("KL") else "labels, all positions"]
        pairs = list(zip(found_S, base, strict=True))
        # Of one seed against the same seed, which have the start and the order of samples in common.
        gained = (
            [one["kl"] - other["kl"] for one, other in pairs],
            [100 * (one["perplexity"] / other["perplexity"] - 1) for one, other in pairs],
        )
        cells = [_spread([one[column] for one in found_S]) for column in ("kl", "perplexity")]
        cells += ["–"] * 2 if found_S is base else [_difference(values) for values in gained]
        rows.append([row, *cells])
    header = ["objective and positions", "KL", "perplexity", "KL against all", "perplexity against all, %"]
    return table(header, rows)


def _difference(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def main() -> None:
    noise = capture()
    noisy, clean = measure("noisy", NOISY_RUNS, on_noisy_text), measure("clean", RUNS, on_clean_text)
    body = (
        "Three seeds; means ± standard deviations. Metrics are over all positions of text that was not "
        "trained on, unweighted. The last columns are of pairs with the same seed, which have the start, "
        "the samples and their order in common; below zero is better. All runs of a table take the same "
        "steps, so those with `--select` learn from fewer positions.\n\n"
        "## Clean text\n\nThe quickstart's cache; a student of random weights, 2 layers of 96, 24 steps of "
        f"4 samples of 256 tokens.\n\n{clean}\n\n"
        f"## Noisy text\n\n{noise} The cache is of that text. A student of the teacher's weights, narrowed "
        "to 2 layers of 128, 100 steps of 4 samples of 128 tokens, is measured on "
        f"{CLEAN_DOCUMENTS} other documents, which are clean.\n\n{noisy}"
    )
    write_result("curriculum", "Positions selected and weighted by what the cache knows", body)


if __name__ == "__main__":
    main()
