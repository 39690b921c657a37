"""The pooler that turns a step's hidden states into packed feature rows, inside vLLM's worker.

Shapes: N scheduled positions of a step, D hidden size, C bytes per packed row.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.platforms import current_platform
from vllm.v1.pool.metadata import PoolingMetadata

from featurestore.format.tail import row_shifts
from pipeline.capture.packing import RowLayout, distribution_fields, hidden_fields
from pipeline.capture.spec import POOLING_TASK, CaptureSpec

# A chunk of logits is held in float32 a few times over on a GPU: 2**25 elements are 128 MiB each. On a CPU a
# chunk has to stay below what the allocator keeps (see VllmEngine), and the reduction goes on by tiles.
_CHUNK_ELEMENTS = 2**25
_CPU_CHUNK_ELEMENTS = 2**23
_CHUNK_ROWS = range(64, 512)


class CapturePooler(Pooler):  # type: ignore[misc]
    """LM head in chunks of rows, each reduced at once, so that N x V logits never exist."""

    def __init__(self, model: Any, spec: CaptureSpec, vllm_config: VllmConfig) -> None:
        super().__init__()
        # In a tuple, or torch would register the model as a submodule of its own submodule.
        self._model = (model,)
        self.spec = spec
        self.hidden_size = vllm_config.model_config.get_hidden_size()
        self.depth = vllm_config.model_config.get_total_num_hidden_layers()
        self.layout = RowLayout.of(spec, self.hidden_size)
        elements = _CPU_CHUNK_ELEMENTS if current_platform.is_cpu() else _CHUNK_ELEMENTS
        self.chunk_rows = min(max(elements // spec.vocab_size, _CHUNK_ROWS.start), _CHUNK_ROWS.stop)

    def get_supported_tasks(self) -> Set[Any]:
        return {POOLING_TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None] | None:
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        labels = _labels(pooling_metadata, scheduled).to(hidden_states.device)
        shifts = _shifts(pooling_metadata, scheduled, self.spec.seed).to(hidden_states.device)
        packed = self._reduce(hidden_states, labels, shifts)
        if packed is None:  # tensor parallel: the logits were gathered on another rank
            return None
        out: list[torch.Tensor | None] = []
        states, finished_mask = pooling_metadata.pooling_states, cursor.get_finished_mask()
        for rows, state, finished in zip(torch.split(packed, scheduled), states, finished_mask, strict=True):
            # Chunked prefill: a prompt's rows arrive over several steps.
            state.hidden_states_cache.append(rows)
            if finished:
                out.append(torch.cat(state.hidden_states_cache))
                state.clean()
            else:
                out.append(None)
        return out

    def _reduce(
        self, states: torch.Tensor, labels_N: torch.Tensor, shifts_N: torch.Tensor
    ) -> torch.Tensor | None:
        parts = []
        for start in range(0, len(states), self.chunk_rows):
            chunk = slice(start, start + self.chunk_rows)
            fields = self._reduce_chunk(states[chunk], labels_N[chunk], shifts_N[chunk])
            if fields is None:
                return None
            parts.append(self.layout.pack(fields))
        return torch.cat(parts)

    def _reduce_chunk(
        self, states: torch.Tensor, labels_N: torch.Tensor, shifts_N: torch.Tensor
    ) -> dict[str, torch.Tensor] | None:
        streams = torch.split(states, self.hidden_size, dim=-1)
        final, inner = streams[0], iter(streams[1:])
        fields: dict[str, torch.Tensor] = {}
        if self.spec.needs_logits:
            logits = self._model[0].compute_logits(final)
            if logits is None:
                return None
            real = logits[:, : self.spec.vocab_size]
            fields |= distribution_fields(self.spec, real, labels_N, shifts_N)
        for layer, dtype in zip(self.spec.layers, self.spec.hidden_dtypes, strict=True):
            stream = final if layer == self.depth else next(inner)
            fields |= hidden_fields(layer, stream, dtype)
        return fields


def _labels(metadata: PoolingMetadata, scheduled: list[int]) -> torch.Tensor:
    """int64 [N] on the CPU: the token after each scheduled position, -1 at the end of a prompt."""
    labels = torch.full((sum(scheduled),), -1, dtype=torch.int64)
    seen = metadata.get_pooling_cursor().seq_lens_cpu.tolist()
    row = 0
    # get_prompt_token_ids_cpu cuts each row at its prompt's length, so the last label stays -1.
    for tokens, count, done in zip(metadata.get_prompt_token_ids_cpu(), scheduled, seen, strict=True):
        following = tokens[done - count + 1 : done + 1]
        labels[row : row + len(following)] = following
        row += count
    return labels


def _shifts(metadata: PoolingMetadata, scheduled: list[int], seed: int) -> torch.Tensor:
    """float64 [N] on the CPU: where the tail draws of each scheduled position begin."""
    seen = metadata.get_pooling_cursor().seq_lens_cpu.tolist()
    prompts = zip(metadata.get_prompt_token_ids_cpu(), scheduled, seen, strict=True)
    shifts = [row_shifts(tokens.numpy(), done - count, done, seed) for tokens, count, done in prompts]
    return torch.from_numpy(np.concatenate(shifts))
