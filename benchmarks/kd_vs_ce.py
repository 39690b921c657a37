"""The same ternary student, tokens, steps and seeds: from the teacher's cache, and from the labels alone."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from common import STUDENT, TRAINING, table, train, write_result

SEEDS = (0, 1, 2)
OBJECTIVES = {
    "cache: KL + 0.1 CE + hidden cosine": (
        *("--logits-loss", "kl", "--ce-weight", "0.1", "--hidden-loss", "cosine", "--hidden-layers", "15"),
    ),
    "labels: CE only": ("--logits-loss", "none", "--ce-weight", "1"),
}


def main() -> None:
    rows = []
    perplexities: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    teacher = 0.0
    for name, flags in OBJECTIVES.items():
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as directory:
                options = (
                    *STUDENT,
                    *TRAINING,
                    *flags,
                    "--max-steps",
                    "48",
                    "--eval-steps",
                    "48",
                    "--seed",
                    str(seed),
                )
                summary = train(Path(directory), *options)
            first, last = summary["first_eval"], summary["last_eval"]
            perplexities[name].append(last["eval_perplexity"])
            teacher = last["eval_teacher_perplexity"]
            drop = 1 - last["eval_kl"] / first["eval_kl"]
            amount = [f"{summary['steps']}", f"{summary['tokens']:,}"]
            divergence = [f"{first['eval_kl']:.3f}", f"{last['eval_kl']:.3f}", f"{drop:.0%}"]
            cost = [f"{last['eval_perplexity']:.1f}", f"{summary['seconds']:.0f}"]
            rows.append([name, str(seed), *amount, *divergence, *cost])
            print(table([""] * len(rows[0]), rows[-1:]), flush=True)
    header = ["objective", "seed", "steps", "tokens", "KL at first", "KL at end", "fall", "perplexity", "s"]
    means = [
        [name, f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"]
        for name, values in perplexities.items()
    ]
    body = (
        "Held-out samples of the cache; KL in nats over the teacher's top 64 and one bucket for the rest "
        f"(a lower bound of the full KL). The teacher's own perplexity there is {teacher:.1f}.\n\n"
        f"{table(header, rows)}\n\n{table(['objective', 'held-out perplexity, mean ± sd'], means)}"
    )
    write_result("kd_vs_ce", "A ternary student from the cache, and from labels alone", body)


if __name__ == "__main__":
    main()
