"""The tables and plot of int8_backward.py, from what its runs left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS, table
from quality_report import shown, spread

from student.bitnet.backward import LOWEST

PLOT = "int8_backward.svg"
TAIL = 5  # logs at the end whose mean is the final training loss

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def final_loss(run: Mapping[str, Any]) -> float:
    return statistics.mean(loss for _, loss in run["curve"][-TAIL:])


def trainings(runs: Runs) -> str:
    """What both rows end with, and how far they lie apart within a seed."""
    rows = []
    for name, value in (
        ("training loss, last 50 steps", final_loss),
        ("held-out KL, nats", lambda run: run["kl"]),
        ("held-out CE, nats", lambda run: run["ce"]),
    ):
        full, int8 = ([value(run) for run in runs[row]] for row in ("full", "int8"))
        apart = [own - theirs for own, theirs in zip(int8, full, strict=True)]
        inside = "yes" if abs(statistics.mean(apart)) <= spread(full) else "**no**"
        rows.append([name, shown(full, 4), shown(int8, 4), shown(apart, 4), inside])
    header = ["", "full", "int8", "int8 - full, by seed", "mean within 1 sd of full's seeds"]
    return table(header, rows)


def report(runs: Runs, measured: Mapping[str, Any]) -> str:
    """The body of the result file."""
    found, seconds = measured["cosines"], measured["seconds"]
    int8 = runs["int8"]
    lowest = min(min(run["cosines"]) for run in int8)
    fallbacks = max(max(run["fallbacks"]) for run in int8)
    sizes = [one["name"] for one in found]
    layers = [
        [name, *(f"{one['layers'][name][what]:.5f}" for one in found for what in ("dX", "dW"))]
        for name in found[0]["layers"]
    ]
    ways = [
        [way, *(f"{one['ways'][way]:.5f}" if way in one["ways"] else "" for one in found)]
        for way in found[-1]["ways"]
    ]
    header = ["layer", *(f"{what}, {size}" for size in sizes for what in ("dX", "dW"))]
    times = [[name, *(f"{1000 * one:.2f}" for one in row)] for name, *row in measured["products"]]
    return "\n\n".join(
        [
            "## Training",
            trainings(runs),
            f"Mean ± standard deviation over {len(int8)} seeds, {int8[0]['settings']['steps']} steps each. "
            f"Lowest live cosine of all layers and steps {lowest:.5f} (the gate is at {LOWEST}), at most "
            f"{fallbacks:g} products fell back.",
            f"![Training loss of both]({PLOT})",
            "## Cosine of int8 products to full ones",
            "Of the int8 row's student after its training (seed 0), bfloat16 autocast, lowest over batches.",
            table(header, layers),
            "By way of rounding, lowest over layers and batches, products themselves in float32; the one "
            "that is used rounds to nearest, per token and per output and 256 tokens:",
            table(["", *sizes], ways),
            "## Time",
            f"CPU time of forward and backward of one sample, the shortest of several by turns, one thread: "
            f"full {seconds['full']:.3f} s, int8 {seconds['int8']:.3f} s (other programs ran on the same "
            "cores, so the numbers are noisy). In training one step of 25 computes both for comparison.",
            "One product, one thread, shortest CPU time in ms:",
            table(["", "int8", "bfloat16", "float32"], times),
        ]
    )


def plot(runs: Runs) -> None:
    """Training loss over steps, mean and band of ± 1 sd over seeds; and the difference by seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "int8_backward"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8))
    losses = {row: [[loss for _, loss in run["curve"]] for run in of] for row, of in runs.items()}
    steps = [step for step, _ in runs["full"][0]["curve"]]
    for row, by_seed in losses.items():
        columns = list(zip(*by_seed, strict=True))
        means, bands = [statistics.mean(at) for at in columns], [spread(at) for at in columns]
        left.plot(steps, means, label=row, lw=1.2)
        low, high = zip(*((m - b, m + b) for m, b in zip(means, bands, strict=True)), strict=True)
        left.fill_between(steps, low, high, alpha=0.2)
    for seed, (full, int8) in enumerate(zip(losses["full"], losses["int8"], strict=True)):
        apart = [own - theirs for own, theirs in zip(int8, full, strict=True)]
        right.plot(steps, apart, lw=1, label=f"seed {seed}")
    left.set(yscale="log", xlabel="step", ylabel="training loss, nats (mean of 10 steps)")
    right.set(xlabel="step", ylabel="int8 - full, nats")
    right.axhline(0, color="gray", lw=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / PLOT, metadata={"Date": None})
