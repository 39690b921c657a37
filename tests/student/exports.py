"""BitNet students for the tests of exports: random, saved as training saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from student import bitnet
from student.export.reference import integer_linears
from student.export.source import Source
from student.saving import save_student
from tests.architectures import CONFIGS
from tests.teachers import word_tokenizer

VOCAB = 199
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
Students = Callable[..., Path]
Export = Callable[..., dict[str, Any]]


def save(directory: Path, model_type: str, **changes: Any) -> Path:
    """A random BitNet student of that architecture, whose norms and biases are not their neutral values."""
    config = AutoConfig.for_model(model_type, **(_SHAPE | CONFIGS[model_type] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    bitnet.convert(model.get_decoder().layers)
    tokenizer = directory / "tokenizer"
    word_tokenizer(config.vocab_size).save_pretrained(tokenizer)
    save_student(model, directory, tokenizer)
    return directory


def add_norms(source: Source, mode: str) -> None:
    """Give ternary layers of an opened student norms of their inputs, as `subln` or `per-projection` has."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for name, layer in integer_linears(source.model):
        if mode == "per-projection" or name.endswith(("o_proj", "down_proj")):
            layer.rms_norm = LlamaRMSNorm(layer.in_features, eps=source.config["rms_norm_eps"])
            layer.rms_norm.weight.data += 0.1 * torch.randn(layer.in_features)
            layer.rms_norm.requires_grad_(False)
