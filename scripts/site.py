"""Lay out the pages of the documentation site in build/site-pages: `make docs` runs it.

Pages lie there as in the repository. The reference of the commands is written from the commands themselves,
that of Python from the public names of `distily`.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import typer

import distily
import pipeline.cli
import student.cli.commands
from student.config.help import EXAMPLES, INTRODUCTION, flag_table

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "site-pages"
# What pages link to, beside pages.
_SUFFIXES = {".md", ".svg", ".png", ".yaml", ".ipynb", ".py", ".sh"}
_FOLDERS = ("docs", "benchmarks", "examples")


def lay_out() -> None:
    """Copy pages and what they link to, and write the two references."""
    shutil.rmtree(OUT, ignore_errors=True)
    pages = [*ROOT.glob("*.md"), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in pages:
        name = path.relative_to(ROOT)
        if path.suffix in _SUFFIXES and not any(part.startswith((".", "_")) for part in name.parts):
            (OUT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, OUT / name)
    reference = OUT / "docs" / "reference"
    reference.mkdir()
    (reference / "commands.md").write_text(commands(), encoding="utf-8")
    (reference / "python.md").write_text(python(), encoding="utf-8")


def commands() -> str:
    """Every command with its arguments and flags, in Markdown."""
    parts = ["# Commands\n"]
    for name, app in (("distily-cache", pipeline.cli.app), ("distily-train", student.cli.commands.app)):
        group = typer.main.get_command(app)
        parts.append(f"## {name}\n\n{_prose(group.help)}\n")
        for word, command in group.commands.items():  # type: ignore[attr-defined]
            parts.append(f"### {name} {word}\n")
            parts.append(_from_cache() if word == "from-cache" else _command(command))
    return "\n".join(parts)


def _from_cache() -> str:
    tables = [f"**{heading}**\n\n{_table(rows)}" for heading, rows in flag_table()]
    return f"{INTRODUCTION}\n```\n{EXAMPLES}```\n\n" + "\n\n".join(tables) + "\n"


def _command(command: typer.core.TyperCommand) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        shown = (
            ", ".join(parameter.opts)
            if parameter.param_type_name == "option"
            else str(parameter.name).upper()
        )
        default = parameter.default
        said = getattr(parameter, "help", None) or ""
        if default not in (None, False, ()) and "default" not in said.lower() and not parameter.required:
            said += f" [default: {default}]"
        rows.append((shown, said))
    return f"{_prose(command.help)}\n\n{_table(rows)}\n"


def _prose(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("\b", "")


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{flag.replace('|', chr(92) + '|')}` | {_cell(said)} |" for flag, said in rows]
    return "\n".join(["| flag | what it does |", "|---|---|", *lines])


def _cell(text: str) -> str:
    flat = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(--[a-z][a-z0-9-]*)", r"`\1`", flat).replace("|", "\\|").replace("<", "&lt;")


def python() -> str:
    """The public names, for mkdocstrings."""
    parts = ["# Python reference\n\nThe names that `distily` offers; [how they are used](../python.md).\n"]
    # Under the names that programs import, which are not always those of the definitions.
    parts += [f"::: distily.{name}\n" for name in distily.__all__ if not name.startswith("_")]
    return "\n".join(parts)


if __name__ == "__main__":
    lay_out()
