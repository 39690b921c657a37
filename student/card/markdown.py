"""Markdown that stays what it is whatever the names in it hold."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath

# Directories of an absolute path inside a word: file:///a/b/, ~/a/, or /a/b/ after a quote or an equals sign.
_DIRECTORIES = re.compile(r"""(?<![^\s"'=:,\[{(])(?:file://)?~?/(?:[^/\s"',]+/)+""")
_PUNCTUATION = re.compile(r"([\\`*_\[\]<>|~$&#!])")


def cut(word: str) -> str:
    """Without the directories of absolute paths: a card names no places of one machine."""
    return PurePath(word).name if PurePath(word).is_absolute() else _DIRECTORIES.sub("", word)


def line(value: object) -> str:
    """`cut`, on one line, of characters that UTF-8 has."""
    return cut(" ".join(str(value).encode("utf-8", "replace").decode().split()))


def text(value: object) -> str:
    """As a reader sees it: one line, nothing in it is markup."""
    return _PUNCTUATION.sub(r"\\\1", line(value))


def fence(content: str, language: str) -> str:
    """A code block that nothing in `content` ends."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{marks}{language}\n{content}\n{marks}"


def command(words: Iterable[object]) -> str:
    """A command line as a code block, its program by name."""
    first, *rest = map(str, words)
    return fence(shlex.join([PurePath(first).name, *map(cut, rest)]), "bash")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A pipe table of plain text; empty without rows."""
    lines = [_row([text(cell) for cell in row]) for row in rows]
    return "\n".join([_row(header), _row(["---"] * len(header)), *lines]) if lines else ""


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs; empty where all of these are."""
    given = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *given]) if given else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
