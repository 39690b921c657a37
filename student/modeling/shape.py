"""The shape of the student: the teacher's configuration, changed, and which teacher layers its layers come
from.

Shape letters: L teacher layers, n student layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from distily.text import one_line
from student.errors import UserError

_NOT_INHERITED = ("quantization_config", "transformers_version", "_name_or_path", "architectures")


def choose_layers(spec: str, count: int, depth: int) -> list[int]:
    """The `count` teacher layers (0..depth-1) that --copy-layers names.

    uniform, and auto before anything is measured, spread them evenly with both ends included; first and last
    take a block; a list is taken as it is and may repeat layers.
    """
    if spec not in ("auto", "uniform", "first", "last"):
        return _explicit_layers(spec, count, depth)
    if count > depth:
        raise UserError(
            f"--copy-layers {spec}: the student has {count} layers, the teacher only {depth}; "
            "name the layers yourself (repeats allowed) or use --init random"
        )
    if spec == "first":
        return list(range(count))
    if spec == "last":
        return list(range(depth - count, depth))
    return [(2 * i * (depth - 1) + count - 1) // (2 * max(count - 1, 1)) for i in range(count)]


def _explicit_layers(spec: str, count: int, depth: int) -> list[int]:
    try:
        layers = [int(part) for part in spec.split(",")]
    except ValueError:
        raise UserError(
            f"--copy-layers {spec!r} is none of auto, uniform, first, last, or a list like 0,4,9"
        ) from None
    if len(layers) != count:
        raise UserError(f"--copy-layers names {len(layers)} layers, but the student has {count}")
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong:
        raise UserError(
            f"--copy-layers: {wrong[0]} is out of range; the teacher's layers are 0 to {depth - 1}"
        )
    return layers


def changed_config(
    teacher: Any, changes: Mapping[str, Any], copy_layers: str, own_tokens: Mapping[str, Any] | None = None
) -> tuple[Any, list[int]]:
    """(student configuration, teacher layer of each student layer).

    own_tokens: settings that follow from a tokenizer of its own; `changes` win.

    Settings that are lists with one entry per layer (`layer_types` of Gemma 3 and Qwen 3) follow the chosen
    layers unless `changes` gives them. UserError for unknown settings and for values that the architecture
    refuses.
    """
    base = teacher.to_dict()
    _check_names(changes, base)
    depth = int(base["num_hidden_layers"])
    count = changes.get("num_hidden_layers", depth)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError("--student-model-config: num_hidden_layers must be a positive whole number")
    layers = choose_layers(copy_layers, count, depth)
    per_layer = {
        name: [value[layer] for layer in layers]
        for name, value in base.items()
        if isinstance(value, list) and len(value) == depth and name.startswith("layer")
    }
    settings = {**base, **per_layer, **(own_tokens or {}), **changes, "dtype": "float32"}
    for name in _NOT_INHERITED:
        settings.pop(name, None)
    try:
        return type(teacher).from_dict(settings), layers
    except Exception as error:  # configurations validate with whatever error their authors chose
        raise UserError(
            f"--student-model-config: the architecture refuses it: {one_line(error, None)}"
        ) from error


def _check_names(changes: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in changes:
        if name not in known or name == "model_type":
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"--student-model-config: the teacher's configuration has no setting {name!r}{hint}"
            )


def check_vocabulary(config: Any, teacher: Any, cached: int, flag: str, same_tokenizer: bool = False) -> None:
    """UserError unless the student has the cached tokens: the teacher's vocabulary, padding included, or with
    the same tokenizer at least the `cached` ids (models of one family pad to different sizes).
    """
    own, theirs = config.get_text_config().vocab_size, teacher.get_text_config().vocab_size
    if own != theirs and not (same_tokenizer and own >= cached):
        raise UserError(
            f"{flag}: the student's vocabulary has {own} tokens, the cache's teacher {theirs}; cached "
            "token ids mean nothing to this student, choose one with the teacher's tokenizer"
        )


def check_positions(config: Any, longest: int, flag: str) -> None:
    """UserError when the longest cached sample does not fit the student."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"{flag}: the student takes {limit} positions, the cache holds samples of {longest}; raise "
            "max_position_embeddings or generate a cache with a smaller --max-seq-len"
        )


def tokenizers_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two parsed tokenizer.json files give different ids to the same text pieces, or the same id to
    different ones. Added tokens that only one of them has are no difference, as models of a family add more.
    """
    vocabularies = [tokenizer.get("model", {}).get("vocab") for tokenizer in (one, other)]
    if not all(isinstance(vocabulary, (dict, Sequence)) for vocabulary in vocabularies):
        return False
    return bool(vocabularies[0] != vocabularies[1]) or _added_differ(added_tokens(one), added_tokens(other))


def added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the added tokens of a parsed tokenizer.json, by their text; without those that are kept free
    for later ones (<|reserved_special_token_2|>, <unused7>).
    """
    added = tokenizer.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    found = {str(entry.get("content")): entry.get("id") for entry in entries}
    return {text: index for text, index in found.items() if "reserved" not in text and "unused" not in text}


def _added_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if any(other.get(text, index) != index for text, index in one.items()):
        return True
    texts = {index: text for text, index in other.items()}
    return any(texts.get(index, text) != text for text, index in one.items())
