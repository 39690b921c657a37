"""The teacher in plain transformers: slower, but any causal LM runs, and its numbers are the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from featurestore.schema import GroupFeatures, GroupSpec
from featurestore.tail import row_shifts
from pipeline.capture.packing import RowLayout, distribution_fields, hidden_fields, to_features
from pipeline.capture.spec import CaptureSpec
from pipeline.engines.base import EngineConfig
from pipeline.quantization import bitsandbytes_config

_CHUNK_ROWS = 512


class TransformersEngine:
    """One `AutoModelForCausalLM` in evaluation mode, a sample at a time: T x V logits are held at most."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self._torch = torch
        self._spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._layout = RowLayout.of(self._spec, config.hidden_size)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        given = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        # The default one of transformers' attention kernels leaves out soft-capping without a word (Gemma 2).
        capped = getattr(given.get_text_config(), "attn_logit_softcapping", None) is not None
        dtype = getattr(torch, config.dtype)
        how: dict[str, Any] = {}
        if config.quantize_to:
            # Loaded where it will stay: an 8-bit model cannot be moved.
            quantization = bitsandbytes_config(config.quantize_to, dtype)
            how = {"quantization_config": quantization, "device_map": {"": self._device}}
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            config=given,
            attn_implementation="eager" if capped else None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **how,
        )
        self._model = model.eval() if config.quantize_to else model.eval().to(self._device)

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        for tokens in prompts:
            with self._torch.inference_mode():
                rows = self._capture_one(tokens).cpu().numpy()
            yield to_features(self._layout.unpack(rows), self.groups)

    def _capture_one(self, tokens: np.ndarray) -> Any:
        torch = self._torch
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        out = self._model(
            input_ids=ids[None],
            output_hidden_states=bool(self._spec.layers),
            use_cache=False,
            logits_to_keep=0 if self._spec.needs_logits else 1,
        )
        labels = torch.cat([ids[1:], ids.new_full((1,), -1)])
        spec = self._spec
        shifts = torch.from_numpy(row_shifts(tokens, 0, len(tokens), spec.seed)).to(self._device)
        parts = []
        for start in range(0, len(ids), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            fields: dict[str, Any] = {}
            if spec.needs_logits:
                logits = out.logits[0, chunk, : spec.vocab_size]
                fields |= distribution_fields(spec, logits, labels[chunk], shifts[chunk])
            for layer, dtype in zip(spec.layers, spec.hidden_dtypes, strict=True):
                fields |= hidden_fields(layer, out.hidden_states[layer][0, chunk], dtype)
            parts.append(self._layout.pack(fields))
        return torch.cat(parts)

    def close(self) -> None:
        del self._model
