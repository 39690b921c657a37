"""Teachers whose classes also see, used for their text; and those that vLLM only wraps.

That both engines give the same of them is in test_engine_agreement.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GPTNeoForCausalLM,
    GraniteForCausalLM,
)

from pipeline.engines.plain_head import has_plain_head
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import load_teacher
from pipeline.teacher.model_class import auto_class
from tests import architectures


@pytest.mark.parametrize("kind", architectures.MULTIMODAL)
def test_the_text_part_has_to_be_whole(kind: str, tmp_path: Path) -> None:
    teacher = architectures.make_multimodal(kind, tmp_path / "teacher")
    whole = load_teacher(str(teacher))
    assert (whole.vocab_size, whole.hidden_size, whole.num_layers) == (architectures.VOCAB, 64, 4)
    weights = load_file(teacher / "model.safetensors")
    (name,) = (name for name in weights if name.endswith(".2.self_attn.q_proj.weight") and "vis" not in name)
    del weights[name]
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"the checkpoint lacks .*layers\.2\.self_attn\.q_proj\.weight"):
        load_teacher(str(teacher))


def test_the_class_is_the_one_that_the_checkpoint_names() -> None:
    """Llama 4 has two classes for one configuration, whose weights go by different names."""
    config: Any = AutoConfig.for_model("llama4")
    for named, expected in (
        (["Llama4ForConditionalGeneration"], AutoModelForMultimodalLM),
        (["Llama4ForCausalLM"], AutoModelForCausalLM),
        (None, AutoModelForCausalLM),
    ):
        config.architectures = named
        assert auto_class(config) is expected
    assert auto_class(AutoConfig.for_model("llama")) is AutoModelForCausalLM


def test_what_lies_behind_the_head_is_found_out() -> None:
    """By what the class computes: Granite divides its logits, and nothing in vLLM's wrapper does."""
    sizes = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for scaling in (1.0, 2.5):
        config = AutoConfig.for_model("granite", logits_scaling=scaling, **sizes)
        assert has_plain_head(GraniteForCausalLM, config) is (scaling == 1.0)
    for cap in (None, 5.0):
        gemma = AutoConfig.for_model("gemma2", final_logit_softcapping=cap, num_key_value_heads=1, **sizes)
        assert has_plain_head(AutoModelForCausalLM._model_mapping[type(gemma)], gemma)
    cohere = AutoConfig.for_model("cohere", logit_scale=0.3, num_key_value_heads=1, **sizes)
    assert has_plain_head(AutoModelForCausalLM._model_mapping[type(cohere)], cohere)
    assert not has_plain_head(torch.nn.Identity, cohere)  # a class that fails


@pytest.mark.vllm
def test_unknown_classes_that_cannot_be_wrapped(tmp_path: Path) -> None:
    from pipeline.engines.vllm_models import find_in_vllm

    assert not GPTNeoForCausalLM.is_backend_compatible()
    for name in ("GPTNeoForCausalLM", "NobodysForCausalLM"):
        with pytest.raises(RequestError, match=rf"does not know {name}.*--engine transformers"):
            find_in_vllm(name, AutoConfig.for_model("gpt_neo"))
