"""Markdown that stays what it is whatever the names in it hold, as GitHub and the hub show it.

What is not `Markdown` already is text: no character of it is markup, and nothing in it becomes a link.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from distily.safety.redaction import redact, redact_words
from distily.text import printable

# Directories of an absolute path inside a word: file:///a/b/, ~/a/, or /a/b/ after a quote or an equals sign.
_DIRECTORIES = re.compile(r"""(?<![^\s"'=:,\[{(])(?:file://)?~?/(?:[^/\s"',]+/)+""")
_PUNCTUATION = re.compile(r"([\\`*_\[\]<>|~$&#!])")
# What GitHub and the hub make a link of, or the mention of somebody, wherever it stands, escaped or not.
_ADDRESS = re.compile(r"://|www\.|@\w|mailto:|xmpp:", re.IGNORECASE)
# At the start of a line: a list, a rule, a heading that is underlined.
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|)([-+=](?=[-+=\s]|$)|[.)](?:\s|$))")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def cut(word: str) -> str:
    """Without the directories of absolute paths: a card names no places of one machine."""
    return PurePath(word).name if PurePath(word).is_absolute() else _DIRECTORIES.sub("", word)


def line(value: object) -> str:
    """`cut`, on one line, of characters that UTF-8 has and that steer nothing, without credentials."""
    return cut(printable(redact(" ".join(str(value).encode("utf-8", "replace").decode().split()))))


def text(value: object) -> Markdown:
    """As a reader sees it: one line, nothing in it is markup."""
    if isinstance(value, Markdown):
        return value
    words = [
        _code(word) if _ADDRESS.search(word) else _PUNCTUATION.sub(r"\\\1", word)
        for word in line(value).split(" ")
    ]
    return Markdown(_BLOCK.sub(r"\1\\\2", " ".join(words)))


def link(shown: object, address: str) -> Markdown:
    """A link to an address of ours."""
    return Markdown(f"[{text(shown)}]({address})")


def fence(content: str, language: str) -> str:
    """A code block that nothing in `content` ends."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    content = printable(content, keep="\n")
    return f"{marks}{language}\n{content}\n{marks}"


def command(words: Iterable[object]) -> str:
    """A command line as a code block, its program by name, without credentials."""
    first, *rest = redact_words(list(map(str, words)))
    return fence(shlex.join([PurePath(first).name, *map(cut, rest)]), "bash")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A pipe table of plain text; empty without rows."""
    lines = [_row([text(cell) for cell in row]) for row in rows]
    return "\n".join([_row(list(map(text, header))), _row(["---"] * len(header)), *lines]) if lines else ""


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs; empty where all of these are."""
    given = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *given]) if given else ""


def _code(word: str) -> str:
    """A word as code, which is the only place where an address stays text; a bar would end a table's cell."""
    marks = "`" * (1 + max(map(len, re.findall("`+", word)), default=0))
    pad = " " * ("`" in word)
    return f"{marks}{pad}{word}{pad}{marks}".replace("|", "\\|")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
