"""Small random-weight teachers of several architectures, as ordinary checkpoints with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = (
    "the",
    "teacher",
    "student",
    "cache",
    "of",
    "a",
    "token",
    "and",
    "is",
    "in",
    "to",
    "learns",
    ".",
    ",",
)


def text_of(words: int, seed: int = 0) -> str:
    """A text of so many of `WORDS`."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, size=words).tolist())


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` and words that no text holds; other words are unknown."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    names += [f"word{index}" for index in range(len(names), vocab_size)]
    vocab = {word: index for index, word in enumerate(names[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def llama(
    directory: Path, vocab_size: int = 199, layers: int = 3, seed: int = 0, positions: int = 256
) -> Path:
    """Llama with a tied head, D=64."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM, config, directory, seed)


def qwen3(directory: Path, vocab_size: int = 1003, seed: int = 0) -> Path:
    """Qwen3 with an untied head and a vocabulary that vLLM pads."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(Qwen3ForCausalLM, config, directory, seed)


def gemma3(directory: Path, vocab_size: int = 262_144, seed: int = 0) -> Path:
    """Gemma3 text: tied head, soft-capped logits, sliding and full attention, no aux interface in vLLM."""
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=32,
        final_logit_softcapping=10.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(Gemma3ForCausalLM, config, directory, seed)


def lfm2(directory: Path, vocab_size: int = 199, seed: int = 0) -> Path:
    """Lfm2, D=32, which mixes positions by short convolutions that no attention mask stops.

    Its embeddings are as small as by default: beside larger ones, such small layers change next to nothing.
    """
    config = Lfm2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    torch.manual_seed(seed)
    Lfm2ForCausalLM(config).float().save_pretrained(directory)
    word_tokenizer(vocab_size).save_pretrained(directory)
    return directory


def _save(model_class: type, config: object, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).float()
    # The default initialisation gives nearly flat distributions; real teachers are peaked.
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one when tied
    with torch.no_grad():
        for weight in ends:
            weight.mul_(20.0)
    model.save_pretrained(directory)
    word_tokenizer(config.vocab_size).save_pretrained(directory)  # type: ignore[attr-defined]
    return directory
