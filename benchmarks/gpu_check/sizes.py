"""What is run, and how much of it: on a GPU, or on any CPU in seconds, where only that it runs is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

LARGE_GPU = 60 * 10**9  # bytes


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    teacher: of its LlamaConfig; weights are random. compared: its hidden layer that students learn from.
    demo: whether the demo's teacher and text are what both engines are compared on. Samples have the length
    that stands beside their count. Steps of a training are `warm_up` + `timed` + `profiled`, of `batch`
    samples of the cache. head_*: positions and width of the losses alone.
    """

    teacher: Mapping[str, int]
    student_layers: int
    compared: int
    demo: bool
    agreement_samples: int
    agreement_length: int
    capture_samples: int
    capture_warm_up: int
    capture_length: int
    cached_samples: int
    cached_length: int
    batch: int
    warm_up: int
    timed: int
    profiled: int
    head_positions: int
    head_width: int
    vocabularies: tuple[int, ...]
    repeats: int

    @property
    def steps(self) -> int:
        return self.warm_up + self.timed + self.profiled


# Sizes of Llama 3.2 1B. Steps stay below 25, where int8 products are compared with full ones again.
GPU = Size(
    teacher={
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    student_layers=8,
    compared=8,
    demo=True,
    agreement_samples=8,
    agreement_length=512,
    capture_samples=256,
    capture_warm_up=16,
    capture_length=2048,
    cached_samples=64,
    cached_length=1024,
    batch=8,
    warm_up=3,
    timed=20,
    profiled=2,
    head_positions=8192,
    head_width=2048,
    vocabularies=(128_256, 262_144),
    repeats=5,
)
# A student of half the depth and steps of a quarter of the tokens, with AdamW in about 16 GB.
SMALL_GPU = replace(GPU, student_layers=4, batch=2, head_positions=4096)
TOY = Size(
    teacher={
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
    student_layers=2,
    compared=1,
    demo=False,
    agreement_samples=2,
    agreement_length=33,
    capture_samples=4,
    capture_warm_up=1,
    capture_length=32,
    cached_samples=4,
    cached_length=32,
    batch=2,
    warm_up=1,
    timed=1,
    profiled=1,
    head_positions=16,
    head_width=8,
    vocabularies=(1003, 2003),
    repeats=1,
)
NAMES = ("gpu", "toy")


def named(name: str) -> Size:
    """`gpu` depends on the memory of the GPU; asked only in processes that compute."""
    if name == "toy":
        return TOY
    import torch

    return GPU if torch.cuda.get_device_properties(0).total_memory >= LARGE_GPU else SMALL_GPU
