"""The catalogue as a table: for the terminal, as JSON, and for docs/objectives.md."""

from __future__ import annotations

from typing import Any

from student.losses.catalogue import EXACTNESS, NEEDS, Loss, catalogue

KINDS = {
    "head": "On the stored head, inside the fused LM head",
    "dense": "On the full distribution",
    "hidden": "Between hidden states",
    "structure": "Between the positions of a sequence, or between layers",
    "relation": "Between relations inside a layer",
}


def rows() -> list[dict[str, Any]]:
    """One JSON object per loss."""
    return [
        {
            "name": loss.name,
            "kind": loss.kind,
            "formula": loss.formula,
            "paper": None if loss.paper is None else {"title": loss.paper.title, "arxiv": loss.paper.arxiv},
            "needs": list(loss.needs.letters),
            "better_with": list(loss.better.letters),
            "exactness": loss.exactness,
            "statement": loss.statement,
            "options": {
                name: {"default": option.default, "values": option.domain(), "help": option.help}
                for name, option in loss.options.items()
            },
        }
        for loss in catalogue().values()
    ]


def letters(loss: Loss) -> str:
    """`H`, or `H (T)` when T makes it more exact; `–` for nothing."""
    return (loss.needs.letters or "–") + (f" ({loss.better.letters})" if loss.better else "")


def defaults(loss: Loss) -> str:
    """`alpha 0.1, temperature 1`."""
    shown = {name: option.default for name, option in loss.options.items()}
    return ", ".join(f"{name} {'auto' if value is None else value}" for name, value in shown.items())


def show() -> None:
    """Print the table, as wide as the terminal."""
    from rich.table import Table
    from rich.text import Text

    from distily.safety.console import SafeConsole

    console = SafeConsole()
    for kind, title in KINDS.items():
        losses = [loss for loss in catalogue().values() if loss.kind == kind]
        if not losses:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
        for name in ("loss", "formula", "needs", "exactness", "options", "source"):
            table.add_column(name, no_wrap=name in ("loss", "needs"))
        for loss in losses:
            source = "" if loss.paper is None else f"{loss.paper.title} {loss.paper.arxiv or ''}".strip()
            exact = f"{EXACTNESS[loss.exactness]}: {loss.statement}"
            cells = (loss.name, loss.formula, letters(loss), exact, defaults(loss), source)
            table.add_row(*map(Text, cells))  # as they are: brackets would be markup
        console.print(table)
    console.print("needs: " + "; ".join(f"{letter} {text}" for letter, text in NEEDS.values()))


def markdown() -> str:
    """The tables of docs/objectives.md."""
    parts = []
    for kind, title in KINDS.items():
        losses = [loss for loss in catalogue().values() if loss.kind == kind]
        if not losses:
            continue
        parts.append(f"### {title}\n")
        parts.append("| loss | formula | needs | exactness | options | source |\n|---|---|---|---|---|---|")
        parts += [_markdown_row(loss) for loss in losses]
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def _markdown_row(loss: Loss) -> str:
    paper, source = loss.paper, ""
    if paper is not None:
        link = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
        source = f"{paper.title} {link}".strip()
    exact = f"**{EXACTNESS[loss.exactness]}**: {loss.statement}"
    cells = [f"`{loss.name}`", loss.formula, letters(loss), exact, defaults(loss), source]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
