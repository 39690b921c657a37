"""A tokenizer.json as GGUF's metadata.

llama.cpp knows pre-tokenizers by name, so a byte-level BPE tokenizer is taken only when its own is one of
those named here. Word-level tokenizers, which llama.cpp has not, leave a file that takes token ids only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distily.checkpoint.configs import json_object
from student.errors import UserError
from student.modeling.saving import stop_tokens

_ENDS = 3  # eos, eot, eom
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_SPLITS = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}


def add_tokenizer(writer: Any, directory: Path, vocab_size: int) -> str:
    """Write the vocabulary, the merges, the special tokens and the chat template.

    Returns the name of llama.cpp's pre-tokenizer, "none" for a tokenizer of a kind that it has not. Raises
    UserError when it has the kind, but might split text differently.
    """
    path = directory / "tokenizer.json"
    parsed = json_object(path) or {"model": {"type": "none"}}
    kind = parsed["model"]["type"]
    if kind in ("none", "WordLevel"):
        writer.add_tokenizer_model("none")
        return "none"
    if kind != "BPE" or parsed["model"].get("byte_fallback"):
        what = "BPE with byte fallback" if kind == "BPE" else kind
        raise UserError(f"{path}: no GGUF export for {what} tokenizers, only for byte-level BPE")
    name = pre_tokenizer(parsed["pre_tokenizer"], path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens, types = vocabulary(parsed, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = parsed["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    _add_special(writer, directory, tokens)
    return name


def pre_tokenizer(parsed: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer; UserError for one that it is not known for."""
    parts = parsed["pretokenizers"] if parsed["type"] == "Sequence" else [parsed]
    kinds = [part["type"] for part in parts]
    if not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in _SPLITS:
            return _SPLITS[parts[0]["pattern"]["Regex"]]
    raise UserError(
        f"{path}: no GGUF export for its pre-tokenizer ({', '.join(kinds)}): llama.cpp might split "
        "text differently"
    )


def vocabulary(parsed: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token and type; ids that no token has, up to the model's size, are unused padding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in parsed["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in parsed.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _ends(directory: Path, settings: dict[str, Any], tokens: list[str]) -> list[int]:
    """The ids that end a text, that of the tokenizer's end token first; UserError for more than GGUF holds.

    llama.cpp ends a text at its eos, eot and eom; the file has no list of others.
    """
    eos = settings.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    ends = [end for end in stop_tokens(directory) if end < len(tokens)]
    if len(ends) > _ENDS:
        raise UserError(
            f"{directory}: its texts end at {len(ends)} tokens ({', '.join(map(str, ends))}) and a GGUF "
            f"file names {_ENDS}; leave so many in eos_token_id of its generation_config.json and config.json"
        )
    return sorted(ends, key=lambda end: tokens[end] != eos)


def _add_special(writer: Any, directory: Path, tokens: list[str]) -> None:
    settings = json_object(directory / "tokenizer_config.json")
    ids = {token: index for index, token in enumerate(tokens)}
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    fields = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for end, add in zip(_ends(directory, settings, tokens), fields, strict=False):
        add(end)
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if text:
        writer.add_chat_template(text)
