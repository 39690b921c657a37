"""Text of single tokens, from the tokenizer files that lie in a store."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distily.text import token_text
from pipeline.teacher.tokenizer import tokenizer_of

Pieces = Callable[[int], str]


def load_pieces(directory: Path) -> Pieces | None:
    """Token id -> its text ("" where the tokenizer has none).

    None when transformers is not installed, or cannot make a tokenizer of what lies in `directory`.
    """
    if not find_spec("transformers") or not directory.is_dir():
        return None
    try:
        tokenizer: Any = tokenizer_of(directory)
    except Exception:  # tokenizers raise whatever their backend raises, and ids are a fair second best
        return None
    return lambda token: token_text(tokenizer, token)
