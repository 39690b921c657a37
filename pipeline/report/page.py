"""The page about a store, from what was gathered; no I/O."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distily.html.chart import Bar, Series, bar_chart, histogram, line_chart
from distily.html.page import Cell, Html, cards, facts, note, page, paragraph, row, section, table
from distily.units import duration, size
from featurestore.maintenance.info import GroupInfo, StoreInfo
from featurestore.maintenance.listing import Shard
from pipeline.generate.pace import earlier_pace
from pipeline.report.costs import further
from pipeline.report.facts import StoreFacts
from pipeline.report.runs import number_in, runs_section
from pipeline.report.words import sample_section

_SHARDS_SHOWN = 200
_ARRAYS_SHOWN = 6


def default_file(store: str) -> str:
    """`NAME-report.html`, of the store's directory or prefix."""
    return f"{_name(store)}-report.html"


def store_page(found: StoreFacts) -> str:
    """The whole page."""
    info = found.info
    state = "" if info.manifest else " It has no manifest yet: run the same `generate` again to complete it."
    lead = f"What {info.identity.name} said about {info.samples:,} samples, as stored in {info.path}.{state}"
    return page(
        f"Feature store {_name(info.path)}",
        paragraph(lead),
        _key_figures(info),
        note(f"Left out, because features are damaged: {found.damage}") if found.damage else Html(""),
        _identity(info, found.lengths),
        _features(found),
        _bytes(info),
        sample_section(found.view, found.pieces),
        _shards(found.shards),
        _costs(info),
        runs_section(info.runs),
    )


def _key_figures(info: StoreInfo) -> Html:
    records = [record for record in info.runs if number_in(record, "capture_seconds")]
    seconds = sum(number_in(record, "capture_seconds") or 0.0 for record in records)
    tokens = sum(number_in(record, "tokens") or 0.0 for record in records)
    logits = next((group for group in info.groups.values() if group.kind == "logits"), None)
    return cards(
        [
            ("samples", info.samples),
            ("tokens", info.rows),
            ("on disk", size(info.bytes)),
            ("bytes per token", f"{info.bytes / info.rows:,.1f}" if info.rows else None),
            ("in the teacher", duration(seconds) if seconds else None),
            ("tokens per second", f"{tokens / seconds:,.0f}" if seconds else None),
            ("teacher's perplexity", logits.perplexity if logits else None),
            ("mass in the stored heads", _percent(logits.mean_head_mass) if logits else None),
        ]
    )


def _identity(info: StoreInfo, lengths: list[int]) -> Html:
    teacher = info.identity
    quantised = "" if teacher.quantization == "none" else f", {teacher.quantization}"
    weights = ", ".join(f"{part} {size(count)}" for part, count in info.sidecar.items())
    shape: list[tuple[str, Cell]] = [
        ("name", teacher.name),
        ("architecture", teacher.architecture),
        ("vocabulary", f"{teacher.vocab_size:,}"),
        ("hidden size", f"{teacher.hidden_size:,}"),
        ("layers", teacher.num_layers),
    ]
    captured: list[tuple[str, Cell]] = [
        ("engine", f"{teacher.engine} {teacher.engine_version}, {teacher.dtype}{quantised}"),
        ("teacher's weights", teacher.digest),
        ("tokenizer", teacher.tokenizer_digest),
        ("manifest", info.manifest),
        ("weights in the store", weights or None),
    ]
    return row(facts(shape, "Teacher"), facts(captured, "As captured"), _lengths(info, lengths))


def _lengths(info: StoreInfo, lengths: list[int]) -> Html:
    if not lengths:
        return Html("")
    known: list[tuple[str, Cell]] = [
        ("complete", f"{info.samples:,} of {info.samples_planned:,} samples"),
        ("shortest", f"{min(lengths):,} tokens"),
        ("median", f"{np.median(lengths):,.0f}"),
        ("mean", f"{np.mean(lengths):,.1f}"),
        ("longest", f"{max(lengths):,}"),
    ]
    return facts(known, "Samples")


def _bytes(info: StoreInfo) -> Html:
    groups = sorted(info.groups.items(), key=lambda item: -item[1].bytes)
    bars = [
        Bar(name, group.bytes, f"{size(group.bytes)}, {group.bytes / info.bytes:.1%}")
        for name, group in groups
    ]
    arrays = sorted(
        ((count, f"{group.kind} / {array}") for _, group in groups for array, count in group.arrays.items()),
        reverse=True,
    )
    parts = [
        Bar(name, count, f"{size(count)}, {count / info.bytes:.1%}") for count, name in arrays[:_ARRAYS_SHOWN]
    ]
    rows = [
        (
            name,
            f"{group.tasks_done}/{group.tasks_total}",
            size(group.bytes),
            f"{group.bytes_per_row:,.1f}",
            _contents(group),
        )
        for name, group in groups
    ]
    header = ("column group", "shards", "bytes", "bytes per token", "what is in it")
    return section(
        "Where the bytes are",
        row(bar_chart("By column group", bars), bar_chart("The largest arrays", parts), _errors(info)),
        table(header, rows, "Column groups"),
    )


def _contents(group: GroupInfo) -> str:
    measured = {
        "mean head": group.mean_head_size,
        "mass kept": group.mean_head_mass,
        "entropy": group.mean_entropy,
        "relative error": group.relative_error,
        "share of positions": group.share_of_positions,
    }
    return ", ".join(f"{label} {value:.3g}" for label, value in measured.items() if value is not None)


def _errors(info: StoreInfo) -> Html:
    """Hidden states: how far what is stored is from what the teacher computed."""
    bars = [
        Bar(f"layer {group.spec['layer']}, {group.spec['dtype']}", error, f"{error:.2%}")
        for group in sorted(info.groups.values(), key=lambda one: (one.spec or {}).get("layer", -1))
        if (error := group.relative_error) is not None and group.spec
    ]
    remark = "Root of the squared error by the squared norm, over all tokens, as measured at capture."
    return bar_chart("Error of stored hidden states", bars, remark)


def _features(found: StoreFacts) -> Html:
    lengths = _length_chart(found.lengths)
    if found.survey is None:
        return section("What is in it", row(lengths))
    ranks = found.survey.ranks
    falls = Series("mean probability", list(zip(ranks.ranks, ranks.probability, strict=True)))
    mass = Series("mass up to the rank", list(zip(ranks.ranks, ranks.cumulative, strict=True)))
    wide = Series("heads that reach it", list(zip(ranks.ranks, ranks.reached, strict=True)))
    entropy, surprise = found.survey.entropy, -found.survey.label_logprob
    sampled = "all" if ranks.samples == ranks.of else f"{ranks.samples:,} of {ranks.of:,}"
    return section(
        "What the teacher said",
        note(
            f"Measured on {sampled} samples, at the {ranks.rows:,} positions that are learned from; "
            "the lengths are those of all samples."
        ),
        row(
            line_chart("How its mass falls with rank", [falls], "rank", "probability", log=True, log_x=True),
            line_chart("What the stored heads cover", [mass, wide], "rank", "share", log_x=True),
            _spread("How wide the heads are", found.survey.head_sizes, "entries of the head"),
            _spread("How uncertain it was", entropy[np.isfinite(entropy)], "entropy, nats"),
            _spread("How the true next token surprised it", surprise[np.isfinite(surprise)], "-log p, nats"),
            lengths,
        ),
    )


def _length_chart(lengths: list[int]) -> Html:
    if not lengths:
        return Html("")
    edges = [2**power for power in range(min(lengths).bit_length() - 1, max(lengths).bit_length() + 1)]
    counts, _ = np.histogram(lengths, edges)
    return histogram("How long the samples are", edges, counts.tolist(), "tokens", "samples", log_x=True)


def _spread(title: str, values: np.ndarray[Any, Any], x_label: str) -> Html:
    """A histogram of up to 24 columns from 0; few whole numbers each get one, and stand in its middle."""
    if not len(values):
        return Html("")
    high = float(values.max())
    if values.dtype.kind == "u" and high < 24:
        edges = np.arange(0.5, high + 1)
    else:
        edges = np.linspace(0.0, high or 1.0, 25)
    counts, _ = np.histogram(values, edges)
    return histogram(title, edges.tolist(), counts.tolist(), x_label, "positions")


def _shards(shards: list[Shard]) -> Html:
    missing = [shard for shard in shards if not shard.complete]
    shown = sorted(shards, key=lambda shard: shard.complete)[:_SHARDS_SHOWN]
    rows = [
        (
            shard.task,
            "complete" if shard.complete else "incomplete",
            shard.samples,
            shard.rows,
            size(shard.bytes),
            ", ".join(shard.groups) or "nothing yet",
        )
        for shard in shown
    ]
    state = "all complete" if not missing else f"{len(missing):,} incomplete: run the same `generate` again"
    cut = f" The first {len(shown):,} are listed." if len(shown) < len(shards) else ""
    header = ("shard", "state", "samples", "tokens", "bytes", "column groups")
    return section(
        "Shards", note(f"{len(shards):,} shards, {state}.{cut}"), table(header, rows, "Shards", tall=True)
    )


def _costs(info: StoreInfo) -> Html:
    pace = earlier_pace(info.runs, info.identity.engine)
    rows = [
        (cost.what, size(cost.bytes), None if cost.seconds is None else duration(cost.seconds))
        for cost in further(info, pace)
    ]
    timed = f"Time is {pace.source}, at {pace.tokens_per_second:,.0f} tokens/s." if pace else ""
    remark = (
        "Layers and heads are for the tokens that are there; asked for together they cost one pass of the "
        f"teacher. More samples come with all column groups. Sizes are estimates. {timed}"
    )
    return (
        section("What more would cost", table(("more", "bytes", "teacher"), rows), note(remark))
        if rows
        else Html("")
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _name(store: str) -> str:
    return PurePosixPath(store).name or "store"
