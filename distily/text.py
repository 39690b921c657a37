"""Text for one line of an error or a table."""

from __future__ import annotations


def one_line(what: BaseException | str, limit: int | None = 200) -> str:
    """What an error or a text says, in one line of at most `limit` characters; the error's name where it says
    nothing.

    Example:
        >>> one_line(ValueError("no such\\n  file"))
        'no such file'
    """
    text = " ".join(str(what).split()) or type(what).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
