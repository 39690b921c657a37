"""Does a tokenizer give the ids of the tokenizer.json that lies in its checkpoint?

transformers builds some tokenizers anew from vocabulary and merges, by the class that the configuration
names. Where that class is not the file's (a byte-level BPE labelled `LlamaTokenizerFast`), the ids are others
than those that the model was trained on, and spaces may be lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distily.safety.parsing import parse_json

PROBES = (
    "Hello world, the teacher's student doesn't say: I'LL see.",
    "  two spaces first",
    "a b  c   d    e \t f ",
    "0 12 345 6789 3.14 1,000,000 2nd",
    "line\nline\n\n\nline\r\n\tline\n",
    "na\u00efve caf\u00e9 cafe\u0301 \u201cquoted\u201d \u2014 \u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e "
    "\ud55c\uad6d\uc5b4 \u0440\u0443\u0441 \u0627\u0644 \u00f1 \ufb01 \U0001f642",
    "def f(x):\n    return x**2  # {'a': [1]} <b>",
)
_SPECIAL_TOKENS = 16
# What a configuration may say against its tokenizer.json.
_OVERRIDES = ("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "legacy", "from_slow")


def differing_text(tokenizer: Any, file: Path) -> str | None:
    """The first text to which `tokenizer` gives other ids than the tokenizer.json `file`; None without one.

    tokenizer: of transformers. What stands around a text counts too: transformers takes it from the file,
    whatever `add_bos_token` and `add_eos_token` say.

    Raises:
        ValueError: `file` is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        reference = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{file} is not a tokenizer that `tokenizers` can load: {error}") from error
    reference.no_truncation()
    reference.no_padding()
    special = [token.content for token in reference.get_added_tokens_decoder().values()][:_SPECIAL_TOKENS]
    for text in (*PROBES, *(f"a {token} b{token}c" for token in special)):
        if not _same_ids(tokenizer, reference, text):
            return text
    return None


def without_overrides(config: bytes) -> bytes:
    """The tokenizer_config.json with which transformers takes the ids of tokenizer.json as they are.

    Raises:
        ValueError: `config` is no JSON object.
    """
    given = dict(parse_json(config))
    kept = {name: value for name, value in given.items() if name not in _OVERRIDES}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _same_ids(tokenizer: Any, reference: Any, text: str) -> bool:
    try:
        return all(
            list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            == reference.encode(text, add_special_tokens=special).ids
            for special in (False, True)
        )
    except Exception:  # a tokenizer that cannot take a text has no ids for it
        return False
