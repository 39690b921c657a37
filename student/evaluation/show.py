"""eval.json as tables: the student and its teacher side by side."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distily.text import printable
from distily.units import size

_CACHE_ROWS = (
    ("cross-entropy, nats", "ce"),
    ("perplexity", "perplexity"),
    ("KL(teacher | student), nats", "kl"),
    ("KL(student | teacher), nats", "reverse_kl"),
    ("top-1 agreement", "top1_agreement"),
    ("calibration error", "calibration_error"),
    ("bits per byte", "bits_per_byte"),
)


def show(record: dict[str, Any], console: Console) -> None:
    """Print every section that there is."""
    if record["cache"]:
        _show_cache(record["cache"], console)
    if record.get("trained"):
        _show_figures(record["trained"], "trained on", console)
    if record["texts"]:
        _show_texts(record["texts"], console)
    if record["tasks"]:
        _show_tasks(record["tasks"], console)
    if record.get("prompts"):
        _show_prompts(record["prompts"], console)


def _show_figures(cache: dict[str, Any], whose: str, console: Console) -> None:
    """whose: what the samples are, where they are not those that a student is judged by."""
    mixed = f", mixed {cache['mixture']}" if "mixture" in cache else ""
    samples = f"{cache['samples']:,} samples {whose}".rstrip()
    title = f"cache {cache['path']}{mixed}: {cache['positions']:,} positions of {samples}"
    table = _table("", "student", "teacher")
    for label, name in _CACHE_ROWS:
        if cache["student"].get(name) is None:
            continue
        kind = cache["exactness"].get(name, "exact")
        what = label if kind == "exact" else f"{label} ({kind})"
        student = _with_error(cache["student"][name], cache["student"].get(f"{name}_se"))
        _add(table, what, student, _number(cache["teacher"].get(name)))
    console.print(Text(title), table)


def _show_cache(cache: dict[str, Any], console: Console) -> None:
    _show_figures(cache, "", console)
    for title, rows, whole in (
        ("by position in the sample", cache["by_position"], True),
        ("by entropy of the teacher, nats", cache["by_entropy"], False),
    ):
        if not rows:
            continue
        table = _table("from", "below", "positions", "KL", "student CE", "teacher CE")
        for row in rows:
            ends = [f"{row[end]:.0f}" if whole else f"{row[end]:.3f}" for end in ("from", "to")]
            values = [_with_error(row[name], row.get(f"{name}_se")) for name in ("kl", "ce", "teacher_ce")]
            _add(table, *ends, f"{row['positions']:,}", *values)
        console.print(title, table)


def _show_texts(texts: list[dict[str, Any]], console: Console) -> None:
    columns = ("tokens", "student ppl", "teacher ppl", "student bits/byte", "teacher bits/byte")
    table = _table("text", *columns)
    for text in texts:
        sides = [text["student"], text["teacher"] or {}]
        values = [_number(side.get(name)) for name in ("perplexity", "bits_per_byte") for side in sides]
        _add(table, text["name"], f"{text['tokens']:,}", *values)
    console.print(table)


def _show_tasks(tasks: list[dict[str, Any]], console: Console) -> None:
    table = _table("task", "metric", "records", "student", "teacher")
    for task in tasks:
        metric = task["metric"] if task["filter"] == "none" else f"{task['metric']} ({task['filter']})"
        sides = [_with_error(task[side], task[f"{side}_stderr"]) for side in ("student", "teacher")]
        _add(table, task["task"], metric, f"{task['samples']:,}", *sides)
    console.print(table)


def _show_prompts(prompts: dict[str, Any], console: Console) -> None:
    """The texts as they were written, controls escaped, then how fast."""
    sides = {side: prompts[side] for side in ("teacher", "student") if prompts[side]}
    table = _table("", "text", justify="left")
    for number, prompt in enumerate(prompts["prompts"]):
        # rich would drop some controls, and measure the others as if they were written.
        _add(table, "prompt", printable(prompt, keep="\n\t"))
        for name, side in sides.items():
            one = side["continuations"][number]
            _add(table, name, printable(one["text"], keep="\n\t") + (" ∎" if one["ended"] else ""))
        table.add_section()
    most = f"at most {prompts['max_new_tokens']:,} tokens, always the most likely one; ∎ ends a text"
    console.print(Text(f"continuations, {most}"), table)
    table = _table("", "tokens/s", "computed in", "weights in memory", "checkpoint")
    for side, one in sides.items():
        sizes = (size(one["weight_bytes"]), size(one["checkpoint_bytes"]))
        _add(table, side, _number(one["tokens_per_second"]), one["dtype"], *sizes)
    console.print(Text(f"on {where_measured(prompts['student'])}"), table)


def where_measured(side: dict[str, Any]) -> str:
    """The device, and of a CPU the threads."""
    threads = side["threads"]
    return str(side["device"]) + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def _table(first: str, *others: str, justify: Literal["left", "right"] = "right") -> Table:
    table = Table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "metric" else justify)
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of names and numbers as they are: brackets would be markup."""
    table.add_row(*map(Text, cells))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if value is None or error is None else f"{_number(value)} ± {error:.2g}"
