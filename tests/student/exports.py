"""BitNet students for the tests of exports: random, converted and saved as training does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from student.modeling.plan import StudentPlan
from student.modeling.saving import save_student
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


def save(directory: Path, model_type: str, conversion: str = "none", **changes: Any) -> Path:
    """A random BitNet student of that architecture, converted as training does it, whose own norms and biases
    are not their neutral values.
    """
    config = AutoConfig.for_model(model_type, **(_SHAPE | CONFIGS[model_type] | changes))
    torch.manual_seed(0)
    plan = StudentPlan(
        config=config,
        checkpoint=None,
        layers=[],
        teacher=None,
        conversion=conversion,
        converted=False,
        masters="fp32",
        freeze_embeddings=False,
    )
    student, _ = plan.build([torch.randint(3, VOCAB, (24,)) for _ in range(2)])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1 and "rms_norm" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer = directory / "tokenizer"
    word_tokenizer(config.vocab_size).save_pretrained(tokenizer)
    save_student(student, directory, tokenizer)
    return directory
