"""What every teacher engine offers, and how one is described before it is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from featurestore.format.schema import GroupFeatures, GroupSpec


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start; validated by `pipeline.request` before.

    `dtype` is a torch dtype's name. `groups` are the column groups that one pass produces. `vocab_size` is
    where logits are cut: columns beyond it are padding of the LM head.
    `quantize_to` names what the weights are quantised to while they are loaded
    (pipeline/teacher/quantization.py).
    `max_num_batched_tokens`: positions of one vLLM step; a longer prompt is prefilled in chunks.
    In transformers those of a batch; a longer prompt is a batch of its own.
    `gpu_memory_utilization`: the share of a GPU's memory that vLLM may take; None leaves it vLLM's own.
    """

    model: Path
    architecture: str
    groups: tuple[GroupSpec, ...]
    dtype: str
    max_seq_len: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    quantize_to: str | None = None
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 4096
    gpu_memory_utilization: float | None = None
    trust_remote_code: bool = False
    seed: int = 0


class Engine(Protocol):
    """A loaded teacher that turns token ids into features."""

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        """Yield the features of each prompt (int32 [T], 1 <= T <= max_seq_len), in the order given."""
        ...

    def close(self) -> None:
        """Release the teacher's memory; the engine is not used afterwards."""
        ...
