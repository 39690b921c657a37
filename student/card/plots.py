"""The held-out curves as pictures beside the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from student.report.files import RunFiles

Points = Sequence[tuple[float, float]]


def write_plots(run: RunFiles) -> list[tuple[str, str]]:
    """(file name in the run's directory, what it shows) of each curve that has at least two points."""
    kl = {"student": run.series("eval_kl")}
    perplexity = {
        "student": run.series("eval_perplexity"),
        "teacher": run.series("eval_teacher_perplexity"),
    }
    wanted = [
        ("card-kl.png", "held-out KL(teacher ‖ student), nats per token", kl),
        ("card-perplexity.png", "held-out perplexity", perplexity),
    ]
    drawn = []
    for file, label, curves in wanted:
        if len(curves["student"]) > 1:
            _draw(run.directory / file, label, curves)
            drawn.append((file, f"{label}, by step"))
    return drawn


def _draw(file: Path, label: str, curves: Mapping[str, Points]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            axes.plot(
                *zip(*points, strict=True), "--" if name == "teacher" else "-o", markersize=3, label=name
            )
    axes.set(xlabel="step", ylabel=label)
    if all(value > 0 for points in curves.values() for _, value in points):
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    # Without the version of matplotlib: the same curve is the same file.
    figure.savefig(file, dpi=120, metadata={"Software": None})
