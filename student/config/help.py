"""`from-cache --help` and misspelt flags, without torch and transformers, which take seconds to import.

Our own flags are read from `CommandOptions`; those of transformers' TrainingArguments are known by name, from
the source file that defines them.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distily.safety.console import SafeConsole
from student.config.flags import CommandOptions
from student.errors import UserError

INTRODUCTION = """\
Train a student from a cache of teacher features, without the teacher.

STORE is what `distily-cache generate` made; several of them teach together.
--output-dir receives checkpoints, the trained student (`from_pretrained` loads
it), report.html and summary.json.
"""
EXAMPLES = """\
A ternary student with 12 of the teacher's layers:

  distily-train from-cache STORE --output-dir out \\
      --student-model-config '{"num_hidden_layers": 12}' \\
      --student-model-as-bitnet --learning-rate 4e-4 --num-train-epochs 3

A recipe, a YAML file of such flags, of one training or of stages:

  distily-train from-cache STORE --output-dir out \\
      --recipe examples/recipes/bitdistill.yaml --max-steps 1000
"""
# Heading -> our flags under it.
_OURS = {
    "Student": (
        "student_model_config",
        "student_model_as_bitnet",
        "student",
        "student_tokenizer",
        "init",
        "copy_layers",
        "teacher",
        "freeze_embeddings",
    ),
    "Objective": (
        "logits_loss",
        "logits_weight",
        "token_map",
        "ce_weight",
        "hidden_loss",
        "hidden_weight",
        "hidden_layers",
        "mapper",
        "layer_map",
        "projector",
        "objective",
    ),
    "Data": (
        "teacher_weights",
        "top_k",
        "top_p",
        "tail",
        "select",
        "weight",
        "pack_rows",
        "train_samples",
        "eval_fraction",
        "manifest",
    ),
    "Ternary weights": (
        "bitnet_conversion",
        "blockwise_steps",
        "blockwise_learning_rate",
        "blockwise_inputs",
        "bitnet_warmup_weights",
        "bitnet_warmup_activations",
        "bitnet_warmup_norms",
        "bitnet_anneal",
        "bitnet_learning_rate",
        "bitnet_weight_decay",
        "bitnet_two_stage",
        "bitnet_masters",
        "bitnet_backward",
    ),
    "The run": ("recipe", "overwrite_output_dir", "quiet", "json"),
}
# The usual ones of TrainingArguments, with our defaults.
_TRAINING = {
    "--max-steps N": "Optimizer steps; goes before --num-train-epochs.",
    "--num-train-epochs N": "How often the cache is read. [default: 3]",
    "--per-device-train-batch-size N": "Samples in a step of one device. [default: 8]",
    "--gradient-accumulation-steps N": "Steps whose gradients make one update. [default: 1]",
    "--learning-rate X": "[default: 4e-4]",
    "--lr-scheduler-type NAME": "[default: cosine]",
    "--bf16 / --no-bf16": "Default: bfloat16 where the machine computes fast in it.",
    "--gradient-checkpointing": "Less memory, more time.",
    "--optim NAME": "E.g. adamw_torch, paged_adamw_32bit. [default: adamw_torch_fused]",
    "--resume-from-checkpoint [DIR]": "Resume where a killed training stopped.",
    "--report-to NAME": "tensorboard, wandb, trackio, ... or none.",
    "--seed N": "Of the weights that are random, and of the order of samples. [default: 42]",
}


def wants_help(words: Sequence[str]) -> bool:
    """Whether the short help is asked for; `--help-all` is the parser's own."""
    return any(word in ("--help", "-h") for word in words)


def show_help(console: Console | None = None) -> None:
    """Print our flags under headings and the usual ones of TrainingArguments."""
    console = console or SafeConsole()
    console.print(Text("\nUsage: distily-train from-cache STORE [STORE ...] --output-dir DIR [flags]\n"))
    for text in (INTRODUCTION, EXAMPLES):
        console.print(Text(text))
    for heading, rows in flag_table():
        _panel(console, heading, rows)
    console.print(Text("All flags of TrainingArguments are understood; --help-all lists every flag."))


def flag_table() -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with the flags under them, each with what it does."""
    known = {field.name: field for field in fields(CommandOptions)}
    assert set(known) == {name for names in _OURS.values() for name in names}, "a flag without a heading"
    ours = [(heading, [_row(known[name]) for name in names]) for heading, names in _OURS.items()]
    return [ours[0], ("Training, of transformers' TrainingArguments", list(_TRAINING.items())), *ours[1:]]


def check_names(words: Sequence[str]) -> None:
    """UserError for a flag that neither we nor TrainingArguments have, before anything is imported for it.

    Where the names of TrainingArguments cannot be read, the parser finds it later.
    """
    theirs = training_arguments()
    if theirs is None:
        return
    ours = {field.name for field in fields(CommandOptions)}
    known = ours | theirs | {f"no_{name}" for name in (*ours, *theirs)} | {"help", "help_all"}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and name[2:].replace("-", "_") not in known:
            raise UserError(unknown_flag(name, (f"--{each.replace('_', '-')}" for each in known)))


def unknown_flag(flag: str, known: Iterable[str]) -> str:
    """What is wrong with a flag that nobody knows, and which may be meant."""
    close = difflib.get_close_matches(flag.replace("_", "-"), list(known), n=1)
    hint = f"did you mean {close[0]}?" if close else "see `distily-train from-cache --help`"
    return f"unknown flag {flag}; {hint}"


def training_arguments() -> set[str] | None:
    """The fields of TrainingArguments, from its source; importing it would import torch."""
    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return None
    try:
        source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = next((node for node in classes if node.name == "TrainingArguments"), None)
    if found is None or found.bases:  # what it inherits is not seen here
        return None
    return {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _row(field: Field[Any]) -> tuple[str, str]:
    kind = str(field.type)
    flag = f"--{field.name.replace('_', '-')}"
    if kind.startswith("Literal"):
        flag += " " + "|".join(part.strip(" '\"") for part in kind[len("Literal[") : -1].split(","))
    elif not kind.startswith("bool"):
        flag += {"int": " N", "float": " X"}.get(kind.split(" ", maxsplit=1)[0], " TEXT")
    said: str = field.metadata["help"].replace("%%", "%")  # as argparse shows it
    shown = field.default not in (None, False, MISSING) and "default" not in said.lower()
    return flag, f"{said} [default: {field.default}]" if shown else said


def _panel(console: Console, heading: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=34, overflow="fold")
    table.add_column()
    for flag, said in rows:
        table.add_row(Text(flag, style="bold cyan"), Text(said))
    console.print(Panel(table, title=heading, title_align="left", border_style="dim"))
