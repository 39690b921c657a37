"""Tokenizers that are hard to load right, as files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the teacher  learns 12 34\n a student of the cache, na\u00efve caf\u00e9.\n\n  "


def byte_level(directory: Path, tokenizer_class: str | None = None, **config: Any) -> Path:
    """Replace the tokenizer of a checkpoint by a byte-level BPE of about 300 ids with <s> in front of a text.

    tokenizer_class: the label in tokenizer_config.json; config: more of it.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        directory
    )
    path = directory / "tokenizer_config.json"
    saved = json.loads(path.read_text()) | config
    saved["tokenizer_class"] = tokenizer_class or saved["tokenizer_class"]
    path.write_text(json.dumps(saved))
    return directory


def own_bpe(directory: Path, size: int, text: str = "") -> Path:
    """A byte-level BPE; with 257 ids it has the bytes and an end token only. size: ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
        directory
    )
    return directory


def word_piece(directory: Path, words: list[str]) -> Path:
    """Replace the tokenizer of a checkpoint by one whose vocabulary is vocab.txt alone: one id per line."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[SEP]"}))
    return directory


def file_ids(directory: Path, text: str) -> list[int]:
    """What tokenizer.json makes of a text, with what it puts around it."""
    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return ids
