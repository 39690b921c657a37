"""What every teacher engine offers, and how one is described before it is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from featurestore.format.schema import GroupFeatures, GroupSpec

# What one prompt is captured as; it may be decoded only when it is read, once, in any thread.
Captured = Mapping[GroupSpec, GroupFeatures]
# Positions of a batch in transformers, where nothing else is asked for.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start; validated by `pipeline.request` before.

    `dtype` is a torch dtype's name. `groups` are the column groups that one pass produces. `vocab_size` is
    where logits are cut: columns beyond it are padding of the LM head.
    `quantize_to` names what the weights are quantised to while they are loaded
    (pipeline/teacher/quantization.py).
    `max_num_batched_tokens`: positions of one vLLM step; a longer prompt is prefilled in chunks.
    In transformers those of a batch; a longer prompt is a batch of its own. None: vLLM's own choice for the
    machine, BATCH_TOKENS in transformers.
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
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    trust_remote_code: bool = False
    seed: int = 0


class Engine(Protocol):
    """A loaded teacher that turns token ids into features.

    An engine may have an attribute `ahead`: how many positions, beyond the shard that is being read, it wants
    to be given early. `capture` is then called for later shards while earlier iterators are still read, each
    to its end and in the order of the calls.
    """

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[Captured]:
        """Yield the features of each prompt (int32 [T], 1 <= T <= max_seq_len), in the order given."""
        ...

    def close(self) -> None:
        """Release the teacher's memory; the engine is not used afterwards."""
        ...
