"""A checkpoint in plain transformers, to capture from or to write with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from distily.checkpoint.weights import explain_gaps
from pipeline.engines.base import EngineConfig
from pipeline.errors import RequestError
from pipeline.teacher.model_class import auto_class
from pipeline.teacher.quantization import bitsandbytes_config


def load_causal_lm(config: EngineConfig) -> Any:
    """The checkpoint in evaluation mode, on the GPU where there is one.

    RequestError where the checkpoint lacks weights, which transformers completes with random numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    # The default one of transformers' attention kernels leaves out soft-capping without a word (Gemma 2).
    capped = getattr(given.get_text_config(), "attn_logit_softcapping", None) is not None
    dtype = getattr(torch, config.dtype)
    how: dict[str, Any] = {}
    if config.quantize_to:
        # Loaded where it will stay: an 8-bit model cannot be moved.
        quantization = bitsandbytes_config(config.quantize_to, dtype)
        how = {"quantization_config": quantization, "device_map": {"": device}}
    model, info = auto_class(given).from_pretrained(
        config.model,
        config=given,
        attn_implementation="eager" if capped else None,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        **how,
    )
    # Weights that only a quantised layer has (norms of BitNet) are not known before it is built.
    if gaps := explain_gaps(info["missing_keys"], {}, ()):
        raise RequestError(f"{config.model}: {gaps}")
    return model.eval() if config.quantize_to else model.eval().to(device)
