"""A plan for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distily.units import duration, number
from student.planning.memory import EXCHANGE, GATHERED, UPDATE
from student.planning.standin import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    GRADIENTS,
    HEAD,
    LOSSES,
    OTHERS,
    REST,
    TERNARY,
    TOP,
)
from student.planning.training import TrainingPlan
from student.sweep.capacity import MARGIN

_PARTS = {
    "weights": "weights",
    GRADIENTS: "gradients",
    "optimizer state": "optimizer state",
    TERNARY: "ternary weights (int8)",
    "meter of flips": "record of the last ternary weights",
    "teacher's weights": "teacher's weights",
    "batch": "batch",
    ACTIVATIONS: "activations",
    HEAD: "LM head and its loss",
    OTHERS: "other losses",
    BACKWARD: "backward pass",
    "optimizer update": "optimizer's update",
    GATHERED: "weights gathered from other processes",
    "gradient buckets": "gradients exchanged between processes",
    "process": "process",
}
_MOMENTS = {
    FORWARD: "in the forward pass of the decoder",
    LOSSES: "in the losses",
    TOP: "where the backward pass begins",
    REST: "in the backward pass",
    EXCHANGE: "where gradients are exchanged",
    UPDATE: "in the optimizer's update",
}


def show(plan: TrainingPlan, console: Console) -> None:
    """Print two tables and what fits."""
    counts = plan.parameters
    text = f"student: {_count(counts['total'])} parameters, {_count(counts['trained'])} trained"
    for name in ("frozen", "ternary"):
        if counts[name]:
            text += f", {_count(counts[name])} {name}"
    console.print(text, highlight=False)
    table = Table(title="memory of one process", title_justify="left")
    for name in ("part", "at most", f"when fullest, {_MOMENTS[plan.memory.moment]}"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, words in _PARTS.items():
        if name in plan.memory.whole:
            table.add_row(words, size(plan.memory.whole[name]), size(plan.memory.at_peak[name]))
    table.add_row(Text("sum", "bold"), "", Text(size(plan.memory.peak), "bold"))
    if plan.target.on_gpu and plan.roomy > plan.memory.peak:
        table.add_row("sum, with the chunks of the head that this GPU has room for", "", size(plan.roomy))
    if plan.memory.paged:
        table.add_row("optimizer state in host memory", size(plan.memory.paged), "")
    console.print(table)
    _show_work(plan, console)
    for line in verdict(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _show_work(plan: TrainingPlan, console: Console) -> None:
    work, setting, processes = plan.work, plan.setting, plan.target.processes
    table = Table(title="work", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    batch = f"{setting.rows} samples"
    batch += f" x {setting.accumulated} accumulated" if setting.accumulated > 1 else ""
    if processes > 1:
        batch += f" x {processes} processes" + (", which share the weights" if setting.sharded else "")
    table.add_row("steps", f"{work.steps:,}; {work.steps_per_epoch:,} per epoch, {work.samples:,} samples")
    table.add_row(
        "step", f"{batch}, {work.tokens_per_step:,.0f} tokens, {work.positions_per_step:,.0f} padded"
    )
    table.add_row("tokens per epoch", f"{work.tokens_per_epoch:,}")
    table.add_row("FLOPs per step", f"{work.flops_per_step:.3g}")
    seconds = plan.seconds_per_step
    if plan.rate is None or seconds is None:
        table.add_row("time", "not estimated: its speed is measured on the machine that trains")
    else:
        rate = f"{number(work.tokens_per_step / seconds)} tokens/s"
        table.add_row(
            "time, estimated",
            f"at least {duration(seconds)} per step, {rate}, {duration(seconds * work.steps)} in all: its "
            f"matrix products at the {plan.rate / 1e9:,.0f} GFLOP/s measured here; what else a step "
            "does, evaluations and saving come on top",
        )
    if (blocks := plan.blockwise) is not None:
        text = f"{blocks.blocks}, of {blocks.steps:,} steps and {blocks.tokens:,} tokens each"
        text += f"; {blocks.flops:.3g} FLOPs of ternary layers in all"
        if plan.seconds_of_blocks is not None:
            text += f", at least {duration(plan.seconds_of_blocks)}, estimated"
        if blocks.states_bytes:
            text += f"; {size(2 * blocks.states_bytes)} of disk for their states"
        table.add_row("blocks before", text)
    console.print(table)


def verdict(plan: TrainingPlan) -> list[str]:
    """Whether it fits, and what to change."""
    memory = size(plan.target.memory)
    where = f"a GPU of {memory}" if plan.target.on_gpu else f"this machine's {memory}"
    margin = f"{size(plan.memory.peak)} and a margin of {MARGIN - 1:.0%}"
    if plan.fits:
        return [f"fits into {where} ({margin})"]
    lines = [f"does not fit into {where} ({margin})"]
    if plan.change is not None:
        flags = " ".join(plan.change.flags)
        return [*lines, f"it does with {flags} ({size(plan.change.memory.peak)}, the same global batch)"]
    if plan.least is not None and plan.least.flags:
        lines.append(f"nor with {' '.join(plan.least.flags)} ({size(plan.least.memory.peak)})")
    return [
        *lines,
        "what else takes less: a smaller student, --freeze-embeddings, --optim adafactor or, for a ternary "
        "student, --bitnet-masters bf16",
    ]


def size(count: float) -> str:
    """Bytes in the units of memory: 1.25 GiB, 12.50 MiB."""
    if not count:
        return "–"
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"


def _count(count: int) -> str:
    """1.54 B, 134.5 M."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:,.4g} {unit}"
    return str(count)
