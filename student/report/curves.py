"""How the runs went: losses, held-out metrics, ternary weights, balanced terms."""

from __future__ import annotations

from collections.abc import Sequence

from distily.html.chart import Series, line_chart
from distily.html.page import Html, note, row, section
from student.report.files import RunFiles

# A factor between the largest and the smallest value.
_WIDE = 5
_BOUND = "The KL takes what is outside the stored head as one bucket: it is a lower bound."
_SHARE = "share"
_TERNARY = {
    "bitnet_flip_rate": "Ternary weights that flipped since the last point",
    "bitnet_zero_share": "Ternary weights that are zero",
    "bitnet_moved_share": "Latent weights that moved since the last point",
}


def training(runs: Sequence[RunFiles]) -> Html:
    """Loss by step, its terms, and the rates that ended in it."""
    objectives = {str(run.summary.get("objective")) for run in runs}
    mixed = "These runs minimise different losses: only the held-out metrics compare them."
    return section(
        "Training",
        note(mixed) if len(objectives) > 1 else Html(""),
        row(
            _chart(runs, "loss", "Training loss", "nats per token"),
            *(_parts(runs, "loss_", "Terms of the loss, unweighted", "each on its own scale")),
            *(_parts(runs, "weight_", "Weights of the terms", "weight")),
            *(_parts(runs, "share_", "Shares of the teachers in their mixture", _SHARE)),
            _chart(runs, "grad_norm", "Gradient norm", "before clipping"),
        ),
    )


def held_out(runs: Sequence[RunFiles]) -> Html:
    """KL, perplexity beside the teacher's, and agreement."""
    perplexity = [Series(_name(run, runs), run.series("eval_perplexity")) for run in runs]
    return section(
        "Held-out samples",
        *(note(f"{_name(run, runs)}: {run.summary['start_warning']}") for run in runs if _warned(run)),
        *(note(f"{_name(run, runs)}: {said}") for run in runs if (said := _aligned(run))),
        note(_BOUND) if any(run.summary.get("held_out_kl") == "lower bound" for run in runs) else Html(""),
        row(
            _chart(runs, "eval_kl", "KL(teacher ‖ student)", "nats per token"),
            _lines("Perplexity", [*perplexity, *_teachers(runs)], "perplexity"),
            _chart(runs, "eval_top1_agreement", "Same most likely token as the teacher", _SHARE),
            _chart(runs, "eval_bits_per_byte", "Bits per byte", "bits"),
        ),
    )


def _aligned(run: RunFiles) -> str | None:
    """What is aligned with a teacher's tokens, of a student with another tokenizer."""
    tokens = run.summary.get("tokens_of_both")
    said = tokens.get("said") if isinstance(tokens, dict) else None
    return said if isinstance(said, str) else None


def _warned(run: RunFiles) -> bool:
    return isinstance(run.summary.get("start_warning"), str)


def ternary(runs: Sequence[RunFiles]) -> Html:
    """What the ternary weights did; nothing where no run has any."""
    charts = (_chart(runs, name, title, _SHARE) for name, title in _TERNARY.items())
    return section("Ternary weights", row(*charts))


def _chart(runs: Sequence[RunFiles], name: str, title: str, label: str) -> Html:
    return _lines(title, [Series(_name(run, runs), run.series(name)) for run in runs], label)


def _lines(title: str, series: Sequence[Series], label: str) -> Html:
    """By step; on a logarithmic axis where values span a factor, but for shares."""
    values = [value for one in series for _, value in one.points]
    log = label != _SHARE and min(values, default=0) > 0 and max(values) > _WIDE * min(values)
    return line_chart(title, series, "step", label, log=log)


def _name(run: RunFiles, runs: Sequence[RunFiles]) -> str:
    return run.name if len(runs) > 1 else "student"


def _parts(runs: Sequence[RunFiles], prefix: str, title: str, label: str) -> list[Html]:
    """A chart for each run that logged more than one thing under `prefix`."""
    charts = []
    for run in runs:
        names = run.logged(prefix)
        if len(names) > 1 or (names and prefix == "weight_"):
            series = [Series(name.removeprefix(prefix), run.series(name)) for name in names]
            of = title if len(runs) == 1 else f"{title}: {run.name}"
            charts.append(_lines(of, series, label))
    return charts


def _teachers(runs: Sequence[RunFiles]) -> list[Series]:
    """The teacher's perplexity, once for all runs that were held out the same samples."""
    found: dict[tuple[float, ...], Series] = {}
    for run in runs:
        points = run.series("eval_teacher_perplexity")
        if points:
            found.setdefault((points[-1][1],), Series("teacher", points, dashed=True))
    many = len(found) > 1
    return [
        Series(f"teacher, perplexity {one.points[-1][1]:.3g}", one.points, dashed=True) if many else one
        for one in found.values()
    ]
