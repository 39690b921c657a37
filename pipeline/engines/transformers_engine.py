"""The teacher in plain transformers: slower, but any causal LM runs, and its numbers are the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from featurestore.schema import GroupFeatures, GroupSpec
from featurestore.tail import row_shifts
from pipeline.capture.packing import RowLayout, distribution_fields, hidden_fields, to_features
from pipeline.capture.spec import CaptureSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.loading import load_causal_lm
from pipeline.engines.memory import memory_for

_CHUNK_ROWS = 512
_NEW_STORE = "each needs a new store, --out"
_FEWER_BITS = (
    "use --engine vllm, or give the teacher fewer bits: --dtype bfloat16, --teacher-load-in-8bit or "
    f"--teacher-load-in-4bit ({_NEW_STORE})"
)
_SHORTER = f"lower --max-seq-len, or use --engine vllm or --teacher-load-in-8bit ({_NEW_STORE})"


class TransformersEngine:
    """One `AutoModelForCausalLM` in evaluation mode, a sample at a time: T x V logits are held at most.

    Raises:
        EngineError: memory ran out, while the teacher was loaded or at a sample.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._layout = RowLayout.of(self._spec, config.hidden_size)
        with memory_for(f"loading the teacher in {config.quantize_to or config.dtype}", _FEWER_BITS):
            self._model = load_causal_lm(config)

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        for tokens in prompts:
            running = f"running the teacher over a sample of {len(tokens):,} tokens"
            with memory_for(running, _SHORTER), torch.inference_mode():
                rows = self._capture_one(tokens).cpu().numpy()
            yield to_features(self._layout.unpack(rows), self.groups)

    def _capture_one(self, tokens: np.ndarray) -> Any:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._model.device)
        out = self._model(
            input_ids=ids[None],
            output_hidden_states=bool(self._spec.layers),
            use_cache=False,
            logits_to_keep=0 if self._spec.needs_logits else 1,
        )
        labels = torch.cat([ids[1:], ids.new_full((1,), -1)])
        spec = self._spec
        shifts = torch.from_numpy(row_shifts(tokens, 0, len(tokens), spec.seed)).to(self._model.device)
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
