"""Tables for people: the text side of `info`, `verify` and `plan`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from distily.units import duration
from featurestore.maintenance.gc import Collection
from featurestore.maintenance.info import StoreInfo
from featurestore.maintenance.listing import Shard
from featurestore.maintenance.verify import Report
from pipeline.generate.estimate import Forecast
from pipeline.report.terminal import bar


def render_plan(console: Console, forecast: Forecast) -> None:
    left_out = str(forecast.left_out) or "nothing"
    if not (forecast.shards_to_do or forecast.sidecar_bytes):
        which = "the first portion's samples" if forecast.sampled else f"{forecast.samples:,} samples"
        console.print(f"nothing to generate: all {which} are in the store (left out: {left_out})")
        return
    table = _facts(f"{forecast.tokens_to_do:,} of {forecast.tokens:,} tokens to capture")
    if forecast.sampled:
        known = "whose size is not known: at least" if forecast.at_least else "as far as read: about"
        table.add_row("estimated", f"from the first portion of the data set, {known} so much")
    table.add_row("samples", f"{forecast.samples:,}")
    table.add_row("left out", left_out)
    if forecast.texts:
        missing = f"{forecast.texts_to_write:,} of {forecast.texts:,} to write"
        table.add_row("continuations", f"{missing}, taken as long as they may get")
    table.add_row("shards to compute", f"{forecast.shards_to_do:,}")
    table.add_row("column groups", ", ".join(forecast.groups_to_do))
    size = decimal(forecast.bytes_to_write)
    bound = f"about {size}, as in this store" if forecast.bytes_measured else f"at most about {size}"
    table.add_row("bytes to write", bound)
    if forecast.sidecar_bytes:
        table.add_row("", f"{decimal(forecast.sidecar_bytes)} of them the teacher's weights, once")
    table.add_row("time", f"about {duration(forecast.seconds)} ({forecast.seconds_from})")
    beside = "the start of the engine and writing are" if forecast.texts else "the start of the engine is"
    table.add_row("", f"{beside} not counted in")
    console.print(table)


def render_info(console: Console, info: StoreInfo) -> None:
    teacher = info.identity
    facts = _facts(info.path)
    facts.add_row("teacher", f"{teacher.name} ({teacher.architecture}, {teacher.digest[:12]})")
    facts.add_row("shape", f"V={teacher.vocab_size:,} D={teacher.hidden_size:,} L={teacher.num_layers}")
    loaded = teacher.dtype if teacher.quantization == "none" else f"{teacher.dtype}, {teacher.quantization}"
    facts.add_row("engine", f"{teacher.engine} {teacher.engine_version}, {loaded}")
    facts.add_row("samples", f"{info.samples:,} of {info.samples_planned:,}")
    facts.add_row("tokens", f"{info.rows:,} of {info.rows_planned:,}")
    facts.add_row("size", decimal(info.bytes))
    parts = ", ".join(f"{part} {decimal(size)}" for part, size in info.sidecar.items())
    facts.add_row("teacher's weights", parts or "none")
    facts.add_row("manifest", info.manifest or "none yet: run the same `generate` again to complete it")
    console.print(facts)
    groups = Table("column group", "shards", "bytes", "bytes/token", "contents", title="column groups")
    for name, group in sorted(info.groups.items()):
        measured = {
            "mean head": group.mean_head_size,
            "mass kept": group.mean_head_mass,
            "entropy": group.mean_entropy,
            "teacher perplexity": group.perplexity,
            "relative error": group.relative_error,
            "share of positions": group.share_of_positions,
        }
        groups.add_row(
            name,
            f"{group.tasks_done}/{group.tasks_total}",
            decimal(group.bytes),
            f"{group.bytes_per_row:,.1f}",
            ", ".join(f"{label} {value:,.3g}" for label, value in measured.items() if value is not None),
        )
    groups.caption = "means are over all positions, those of prompts included"
    console.print(groups)
    _render_lengths(console, info.length_histogram)
    for record in info.runs:
        seconds, tokens = record.get("capture_seconds") or 0.0, record.get("tokens", 0)
        rate = f"in {seconds:,.1f} s, {tokens / seconds:,.0f}/s" if seconds else "without capture"
        began = record.get("began", record.get("command", "?"))
        console.print(f"{began}: {tokens:,} tokens {rate}{_by(record)}", highlight=False)


def _by(record: dict[str, Any]) -> str:
    """Who wrote the samples of a run; a provenance record is any object."""
    written = record.get("writing")
    if not isinstance(written, dict) or not isinstance(written.get("writer"), dict):
        return ""
    digest = str(written["writer"].get("digest"))[:12]
    return f", {written.get('texts', '?')} texts written by {written.get('by', '?')} ({digest})"


def render_report(console: Console, report: Report) -> None:
    for problem in report.problems:
        line = Text.assemble(("damaged", "red"), f" {problem.path}: {problem.what}")
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{len(report.problems)} problems in {report.checked_files:,} files, "
        f"{decimal(report.checked_bytes)} read, {report.rows:,} rows",
        highlight=False,
    )


def render_shards(console: Console, shards: list[Shard]) -> None:
    table = Table("shard", "samples", "tokens", "bytes", "column groups")
    for shard in shards:
        groups = ", ".join(group for group in shard.groups if group != "samples")
        state = Text(groups)
        if not shard.complete:
            state = Text.assemble(groups or "nothing yet", " ", ("(incomplete)", "yellow"))
        table.add_row(shard.task, f"{shard.samples:,}", f"{shard.rows:,}", decimal(shard.bytes), state)
    console.print(table)


def render_collection(console: Console, found: Collection) -> None:
    for orphan in found.orphans:
        state = ("removed" if found.deleted else "garbage") if orphan.removable else "may be in use"
        console.print(
            f"{state}: {orphan.path}, {decimal(orphan.bytes)}, untouched for {orphan.age:,.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    verb = "removed" if found.deleted else "could be removed with --delete"
    console.print(f"{decimal(found.reclaimed)} {verb}", highlight=False)


def _render_lengths(console: Console, histogram: dict[str, int]) -> None:
    most = max(histogram.values(), default=1)
    lengths = Table("tokens", "samples", "", title="sample lengths")
    for span, count in histogram.items():
        lengths.add_row(span, f"{count:,}", bar(count / most))
    console.print(lengths)


def _facts(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
