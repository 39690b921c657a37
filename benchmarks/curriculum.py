"""The same small student, tokens, steps and seeds from the quickstart's cache: from all positions alike, and
with `--select` and `--weight` by what the cache knows of them.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from common import table, train, write_result

SEEDS = (0, 1, 2)
KL, LABELS = ("--logits-loss", "kl"), ("--logits-loss", "none", "--ce-weight", "1")
RUNS: dict[str, tuple[str, ...]] = {
    "KL, all positions": KL,
    "KL, `--select surprise<80%`": (*KL, "--select", "surprise<80%"),
    "KL, `--weight entropy`": (*KL, "--weight", "entropy"),
    "labels, all positions": LABELS,
    "labels, `--select surprise<80%`": (*LABELS, "--select", "surprise<80%"),
}
SHAPE = (
    '{"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3, '
    '"num_key_value_heads": 3, "head_dim": 32}'
)
STUDENT = ("--student-model-config", SHAPE, "--init", "random", "--no-bf16", "--report-to", "none")
TRAINING = ("--per-device-train-batch-size", "4", "--learning-rate", "4e-3", "--save-strategy", "no")
STEPS = ("--max-steps", "24", "--eval-steps", "24", "--eval-on-start", "False", "--quiet")


def main() -> None:
    measured: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for name, flags in RUNS.items():
            with tempfile.TemporaryDirectory() as out:
                options = (*STUDENT, *TRAINING, *STEPS, *flags, "--seed", str(seed))
                summary = train(Path(out), *options)
            measured.setdefault(name, []).append(summary["last_eval"])
            print(seed, name, summary["last_eval"], f"{summary['seconds']:.0f} s", flush=True)
    rows = []
    for name, found in measured.items():
        base = measured["KL, all positions" if name.startswith("KL") else "labels, all positions"]
        # Of one seed against the same seed, which have the start and the order of samples in common.
        gained = [one["eval_kl"] - other["eval_kl"] for one, other in zip(found, base, strict=True)]
        columns = [[one[f"eval_{column}"] for one in found] for column in ("kl", "perplexity")]
        means = [f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}" for values in columns]
        difference = (
            "–" if found is base else f"{statistics.mean(gained):+.3f} ± {statistics.stdev(gained):.3f}"
        )
        rows.append([name, *means, difference])
    header = ["objective and positions", "held-out KL", "held-out perplexity", "KL against all positions"]
    body = (
        "A student of random weights, 2 layers of 96, trained for 24 steps of 4 samples, three seeds; means "
        "± standard deviations. Held-out metrics are over all positions, unweighted. The last column is of "
        f"pairs with the same seed; below zero is better.\n\n{table(header, rows)}"
    )
    write_result("curriculum", "Positions selected and weighted by what the cache knows", body)


if __name__ == "__main__":
    main()
