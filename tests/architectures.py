"""One small random teacher per architecture that the capture is tested on, odd in every way it can be.

`python -m tests.architectures DIRECTORY` writes them all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.teachers import word_tokenizer

VOCAB = 203  # vLLM pads it to 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 512, "tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# model_type -> what sets the architecture apart from _COMMON.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"rope_scaling": None},
    "gemma2": {
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
    },
    "gemma3_text": {"tie_word_embeddings": True, "final_logit_softcapping": 8.0, "sliding_window": 32},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.5,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.3},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "exaone4": {"sliding_window": 32, "sliding_window_pattern": 4},
    "olmo2": {},
    "gpt2": _GPT2,
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": _EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# No single residual stream: refused for hidden states in vLLM.
MANY_STREAMS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "altup_num_inputs": 4,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
        "tie_word_embeddings": True,
    }
}
# Classes that also see, used for their text: model_type -> settings of the text part. The encoder of each is
# tiny, and has as many layers as the text part.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 32, "query_pre_attn_scalar": 24},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
    "qwen3_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
    "mistral3": {"model_type": "mistral"},
    "llama4": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 128,
        "pad_token_id": None,
    },
    "llava": {"model_type": "llama"},
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_ENCODERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"depth": 4, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [3]},
    "qwen3_vl": {"depth": 4, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [1, 2]},
    "mistral3": {"model_type": "pixtral", "head_dim": 16},
    "llama4": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "llava": {"model_type": "clip_vision_model"},
}
_OUTER: dict[str, dict[str, Any]] = {"gemma3": {"mm_tokens_per_image": 4}}
# Those below stand for images in a prompt.
FIRST_TEXT_ID = 9
# Unknown to vLLM 0.32 by name, and run in its wrapper around transformers' class; the last one in part only.
WRAPPED: dict[str, dict[str, Any]] = {
    "ministral3": {},
    "helium": {},
    "nanochat": {},
    "persimmon": {"num_key_value_heads": 2},
    "doge": {"num_experts": 4},
}


def make_multimodal(model_type: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the teacher of that multimodal type; no image processor lies beside it."""
    tied = model_type == "gemma3"
    text = _COMMON | {"tie_word_embeddings": tied} | MULTIMODAL[model_type] | changes
    vision = _ENCODER | _ENCODERS.get(model_type, {})
    outer = {"tie_word_embeddings": tied, "image_token_id": 5, "image_token_index": 5, "video_token_id": 6}
    outer |= {"vision_start_token_id": 7, "vision_end_token_id": 8} | _OUTER.get(model_type, {})
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **outer)
    torch.manual_seed(seed)
    return _write(AutoModelForMultimodalLM.from_config(config, dtype=torch.float32), directory)


def make(model_type: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the teacher of that type, with weights so large that every part of it shows in its outputs."""
    given = _COMMON | (CONFIGS | MANY_STREAMS | WRAPPED)[model_type] | changes
    config = AutoConfig.for_model(model_type, **given)
    torch.manual_seed(seed)
    return _write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), directory)


def _write(model: Any, directory: Path) -> Path:
    with torch.no_grad():
        for weight in model.parameters():
            # Matrices by the factor; norms and biases away from their neutral ones and zeros.
            weight.mul_(6.0) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
        model.get_output_embeddings().weight.mul_(3.0)
    model.save_pretrained(directory)
    word_tokenizer(VOCAB).save_pretrained(directory)
    return directory


def main() -> None:
    for model_type in CONFIGS:
        make(model_type, Path(sys.argv[1]) / model_type)


if __name__ == "__main__":
    main()
