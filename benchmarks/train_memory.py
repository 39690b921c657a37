"""Peak memory of training from the cache beside the same training on labels, each in its own process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import STUDENT, TRAINING, table, train, write_result

RUNS = {
    "labels only (CE)": ("--logits-loss", "none", "--ce-weight", "1"),
    "cache: KL": ("--logits-loss", "kl"),
    "cache: KL + CE + hidden cosine": (
        *("--logits-loss", "kl", "--ce-weight", "0.1", "--hidden-loss", "cosine", "--hidden-layers", "15"),
    ),
}
STEPS = ("--max-steps", "12", "--eval-strategy", "no", "--eval-on-start", "False")


def main() -> None:
    rows, base = [], 0
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as directory:
            summary = train(Path(directory), *STUDENT, *TRAINING, *STEPS, *flags)
        peak = summary["peak_rss_bytes"]
        base = base or peak
        rows.append([name, f"{peak / 2**20:,.0f} MiB", f"{peak / base:.3f}", f"{summary['seconds']:.1f} s"])
    header = ["training", "peak resident memory", "ratio", "12 steps and a final evaluation"]
    body = f"6-layer ternary student, batch 4 x 512, bf16 autocast.\n\n{table(header, rows)}"
    write_result("train_memory", "Memory of training from the cache", body)


if __name__ == "__main__":
    main()
