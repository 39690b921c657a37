"""Text for one line of an error or a table."""

from __future__ import annotations

from typing import Any


def one_line(what: BaseException | str, limit: int | None = 200) -> str:
    """What an error or a text says, in one line of at most `limit` characters; the error's name where it says
    nothing.

    Example:
        >>> one_line(ValueError("no such\\n  file"))
        'no such file'
    """
    text = " ".join(str(what).split()) or type(what).__name__
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
