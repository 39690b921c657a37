"""Text for one line of an error or a table, and for terminals."""

from __future__ import annotations

import unicodedata
from typing import Any

from distily.safety.redaction import redact

# Categories of characters that steer a terminal or reorder what stands beside them: controls, formats (among
# them the marks of bidirectional text), halves of surrogate pairs, separators of lines and paragraphs.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Scripts and emoji are built with them.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """`text` as a terminal may show it: what would move the cursor, colour the screen, ring the bell or turn
    the text beside it around is written as an escape, as Python writes it.

    Args:
        text: from anywhere.
        keep: characters that stay, e.g. a line break where several lines are meant.

    Example:
        >>> printable("a name\\x1b[2J")
        'a name\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(one if _stays(one, keep) else one.encode("unicode_escape").decode() for one in text)


def one_line(what: BaseException | str, limit: int | None = 200) -> str:
    """What an error or a text says, in one line of at most `limit` characters, without credentials and
    without what steers a terminal; the error's name where it says nothing.

    Example:
        >>> one_line(ValueError("no such\\n  file"))
        'no such file'
    """
    text = printable(redact(" ".join(str(what).split()))) or type(what).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text as it stands inside a text, "" where the tokenizer has none.

    Tokenizers that begin every text with a space take the first one away when they decode, so that the text
    is what a second token adds.

    tokenizer: of transformers.
    """
    one, two = (
        str(tokenizer.decode([token] * count, clean_up_tokenization_spaces=False)) for count in (1, 2)
    )
    return two.removeprefix(one) if two.startswith(one) else one


def _stays(letter: str, keep: str) -> bool:
    return letter in keep or letter in _JOINERS or unicodedata.category(letter) not in _STEERING
