"""The teacher in plain transformers: slower, but any causal LM runs, and its numbers are the reference.

B samples of a batch, T positions of its longest, V vocabulary, C bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from featurestore.format.tail import row_shifts
from pipeline.capture.packing import PackedFeatures, RowLayout, distribution_fields, hidden_fields
from pipeline.capture.spec import CaptureSpec
from pipeline.engines.base import BATCH_TOKENS, EngineConfig
from pipeline.engines.batching import batches, padding_is_exact, pieces
from pipeline.engines.loading import load_causal_lm
from pipeline.engines.memory import memory_for

_CHUNK_ROWS = 512
# Samples are sorted by length within so many batches, whose features are held until all are there.
_BATCHES_PER_PIECE = 8
_PROBE_TOKENS = 24
_NEW_STORE = "each needs a new store, --out"
_FEWER_BITS = (
    "use --engine vllm, or give the teacher fewer bits: --dtype bfloat16, --teacher-load-in-8bit or "
    f"--teacher-load-in-4bit ({_NEW_STORE})"
)
_SHORTER = f"lower --max-seq-len, or use --engine vllm or --teacher-load-in-8bit ({_NEW_STORE})"


class TransformersEngine:
    """One causal language model in evaluation mode, over batches of samples that are padded on the right.

    The padded positions of a batch are at most `max_num_batched_tokens` and at most `max_seq_len`, so that
    its B x T x V logits take no more than those of the longest sample. A teacher whose numbers depend on what
    else is in a batch takes one sample at a time.

    Raises:
        EngineError: memory ran out, while the teacher was loaded or at samples.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._layout = RowLayout.of(self._spec, config.hidden_size)
        with memory_for(f"loading the teacher in {config.quantize_to or config.dtype}", _FEWER_BITS):
            self._model = load_causal_lm(config)
        limit = min(config.max_num_batched_tokens or BATCH_TOKENS, config.max_seq_len)
        self._limit = limit if padding_is_exact(self._model) and self._padding_changes_nothing(limit) else 1

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[PackedFeatures]:
        for piece in pieces(prompts, _BATCHES_PER_PIECE * self._limit):
            rows_of: dict[int, np.ndarray] = {}
            for places in batches([len(tokens) for tokens in piece], self._limit):
                captured = self._capture_batch([piece[place] for place in places])
                rows_of |= zip(places, captured, strict=True)
            for place in range(len(piece)):
                yield PackedFeatures(rows_of.pop(place), self._layout, self.groups)

    def _capture_batch(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [T, C] of each sample."""
        with _memory_for_samples(batch), torch.inference_mode():
            out = self._run(batch)
            return [self._reduce(tokens, out, row).cpu().numpy() for row, tokens in enumerate(batch)]

    def _run(self, batch: Sequence[np.ndarray]) -> Any:
        """transformers' output, its logits [B, T, V] and hidden states [B, T, D]; rows end in padding."""
        ids_BT = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, tokens in enumerate(batch):
            ids_BT[row, : len(tokens)] = tokens
            mask_BT[row, : len(tokens)] = 1
        device = self._model.device
        # A single sample has no padding, and not every teacher takes a mask.
        mask = {"attention_mask": torch.from_numpy(mask_BT).to(device)} if len(batch) > 1 else {}
        return self._model(
            input_ids=torch.from_numpy(ids_BT).to(device),
            output_hidden_states=bool(self._spec.layers),
            use_cache=False,
            logits_to_keep=0 if self._spec.needs_logits else 1,
            **mask,
        )

    def _reduce(self, tokens: np.ndarray, out: Any, row: int) -> torch.Tensor:
        """uint8 [T, C]: what is kept of the sample in that row of the batch."""
        spec, device = self._spec, self._model.device
        labels = torch.from_numpy(np.append(tokens[1:], -1).astype(np.int64)).to(device)
        shifts = torch.from_numpy(row_shifts(tokens, 0, len(tokens), spec.seed)).to(device)
        parts = []
        for start in range(0, len(tokens), _CHUNK_ROWS):
            chunk = slice(start, min(start + _CHUNK_ROWS, len(tokens)))
            fields: dict[str, Any] = {}
            if spec.needs_logits:
                logits = out.logits[row, chunk, : spec.vocab_size]
                fields |= distribution_fields(spec, logits, labels[chunk], shifts[chunk])
            for layer, dtype in zip(spec.layers, spec.hidden_dtypes, strict=True):
                fields |= hidden_fields(layer, out.hidden_states[layer][row, chunk], dtype)
            parts.append(self._layout.pack(fields))
        return torch.cat(parts)

    def _padding_changes_nothing(self, limit: int) -> bool:
        """Whether two short random samples give together, up to rounding, what each gives alone."""
        longest = max(1, min(_PROBE_TOKENS, limit // 2))
        random = np.random.default_rng(0)
        batch = [random.integers(0, self._spec.vocab_size, size) for size in (longest, (longest + 1) // 2)]
        with _memory_for_samples(batch), torch.inference_mode():
            together = self._outputs(self._run(batch))
            for row, tokens in enumerate(batch):
                for padded, alone in zip(together, self._outputs(self._run([tokens])), strict=True):
                    if padded.ndim != 3 or not _close(padded[row, : len(tokens)], alone[0]):
                        return False
        return True

    def _outputs(self, out: Any) -> list[torch.Tensor]:
        """All that features are made of."""
        logits = [out.logits] if self._spec.needs_logits else []
        return logits + [out.hidden_states[layer] for layer in self._spec.layers]

    def close(self) -> None:
        del self._model


def _close(padded_TX: torch.Tensor, alone_TX: torch.Tensor) -> bool:
    """Whether each row differs by rounding only: half of the digits of their type agree."""
    tolerance = torch.finfo(alone_TX.dtype).eps ** 0.5
    difference_T = torch.linalg.vector_norm(padded_TX.float() - alone_TX.float(), dim=-1)
    return bool((difference_T <= tolerance * torch.linalg.vector_norm(alone_TX.float(), dim=-1)).all())


def _memory_for_samples(batch: Sequence[np.ndarray]) -> AbstractContextManager[None]:
    longest = max(map(len, batch))
    if len(batch) == 1:
        return memory_for(f"running the teacher over a sample of {longest:,} tokens", _SHORTER)
    running = f"running the teacher over {len(batch):,} samples of up to {longest:,} tokens together"
    return memory_for(running, f"lower --max-num-batched-tokens; or {_SHORTER}")
