"""report.html: one self-contained page about a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from student.chart import Line, line_chart
from student.summary import Run

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e6e6e6); --soft: light-dark(#d9dce0, #3a3d42);
  --paper: light-dark(#ffffff, #17181a); }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { border-bottom: 1px solid var(--soft);
  padding: .25rem .9rem .25rem 0; text-align: right; } td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--ink); }
svg line, svg polyline { fill: none; stroke-width: 2; } svg .grid { stroke: var(--soft); stroke-width: 1; }
.c0 { stroke: light-dark(#0b62d6, #6ea8fe); } .c1 { stroke: light-dark(#c2410c, #fb923c); }
.c2 { stroke: light-dark(#15803d, #4ade80); } .c3 { stroke: light-dark(#7e22ce, #c084fc); }
.c4 { stroke: light-dark(#b91c1c, #f87171); } .dashed { stroke-dasharray: 6 4; }
"""


def write_report(run: Run, summary: Mapping[str, Any]) -> None:
    """Write report.html into the output directory; it needs no other file and no network."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Distillation report</title><style>{_STYLE}</style></head><body>"
        f"<h1>Distillation report</h1>{_intro(run, summary)}{_losses(run)}{_held_out(run, summary)}"
        f"{_cache(summary['cache_cost'])}{_sizes(summary)}</body></html>\n"
    )
    (run.output_dir / "report.html").write_text(page, encoding="utf-8")


def _intro(run: Run, summary: Mapping[str, Any]) -> str:
    config = run.model.config.get_text_config()
    kind = "BitNet b1.58 student" if summary["sizes"]["ternary_parameters"] else "student"
    speed = summary["tokens_per_second"]
    rate = f" ({speed:,.0f} tokens/s, evaluations included)" if speed else ""
    return (
        f"<p>A {config.num_hidden_layers}-layer {kind} of <b>{escape(run.reader.identity.name)}</b>, "
        "trained from "
        f"a cache of its features on {summary['train_samples']:,} samples in {summary['steps']:,} steps, "
        f"{summary['seconds']:,.0f} s{rate}. {summary['held_out_samples']:,} samples were held out. The "
        "teacher's "
        "model was not in the training process.</p>"
    )


def _losses(run: Run) -> str:
    objective = run.model.objective
    lines = [Line("loss", _series(run.training_logs, "loss"))]
    if len(objective.labels) > 1:
        lines += [Line(label, _series(run.training_logs, f"loss_{label}")) for label in objective.labels]
    terms = " + ".join(f"{term.weight} · {escape(term.label)}" for term in objective.terms)
    flips = Line("flipped since the last point", _series(run.training_logs, "bitnet_flip_rate"))
    ternary = (
        f"<h3>Ternary weights that moved</h3>{line_chart([flips], 'step', 'share')}" if flips.points else ""
    )
    ternary += _drift(run)
    return f"<h2>Training loss</h2><p>{terms}</p>{line_chart(lines, 'step', 'nats per token')}{ternary}"


def _drift(run: Run) -> str:
    if run.drift is None:
        return ""
    rows = [("norms and quantisation", f"{run.drift.quantised:.3f}")]
    if run.drift.norms is not None:
        rows.insert(0, ("calibrated norms alone", f"{run.drift.norms:.3f}"))
    header = ("what conversion changed before the first step", "relative change of final hidden states")
    return _table(header, rows)


def _held_out(run: Run, summary: Mapping[str, Any]) -> str:
    if not run.evaluations:
        return "<h2>Held-out samples</h2><p>None (--eval-fraction 0).</p>"
    perplexity = _series(run.evaluations, "eval_perplexity")
    teacher = _series(run.evaluations, "eval_teacher_perplexity")
    kl = line_chart(
        [Line("KL(teacher || student)", _series(run.evaluations, "eval_kl"))], "step", "nats per token"
    )
    lines = [Line("student", perplexity), Line("teacher", teacher, dashed=True)]
    chart = line_chart(lines, "step", "perplexity", log=True)
    names = {
        "eval_kl": "KL(teacher ‖ student), nats per token (lower bound: the tail is one bucket)",
        "eval_ce": "cross-entropy, nats per token",
        "eval_perplexity": "perplexity",
        "eval_teacher_perplexity": "teacher's perplexity",
        "eval_top1_agreement": "same most likely token as the teacher",
    }
    first, last = summary["first_eval"], summary["last_eval"]
    rows = [
        (label, _number(first[name]), _number(last[name]))
        for name, label in names.items()
        if name in first and name in last
    ]
    table = _table(("held-out samples", f"step {first['step']:g}", f"step {last['step']:g}"), rows)
    return f"<h2>Held-out samples</h2>{table}{kl if 'eval_kl' in last else ''}{chart}"


def _cache(cost: Mapping[str, Any]) -> str:
    rows = [
        ("teacher", escape(cost["teacher"])),
        ("samples", f"{cost['samples']:,}"),
        ("tokens", f"{cost['tokens']:,}"),
        ("bytes", f"{cost['bytes']:,}"),
        ("bytes per token", f"{cost['bytes_per_token']:,}"),
    ]
    rows += [
        (f"of these {escape(kind)}", f"{group['bytes_per_token']:,}")
        for kind, group in cost["groups"].items()
    ]
    if cost["capture_seconds"] is not None:
        rows.append(("seconds in the teacher", f"{cost['capture_seconds']:,.1f}"))
    if cost["capture_tokens_per_second"] is not None:
        rows.append(("tokens per second", f"{cost['capture_tokens_per_second']:,}"))
    engine = escape(cost["engine"])
    return f"<h2>What the cache cost</h2>{_table(('cache', f'engine {engine}'), rows)}"


def _sizes(summary: Mapping[str, Any]) -> str:
    sizes = summary["sizes"]
    rows = [
        ("student parameters", f"{sizes['student_parameters']:,}"),
        ("of these ternary", f"{sizes['ternary_parameters']:,} ({sizes['ternary_share']:.1%})"),
        ("checkpoint bytes", f"{sizes['checkpoint_bytes']:,}"),
        ("peak memory of the training process, bytes", f"{summary['peak_rss_bytes']:,}"),
    ]
    return f"<h2>Sizes</h2>{_table(('', ''), rows)}"


def _series(entries: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells must be escaped already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
