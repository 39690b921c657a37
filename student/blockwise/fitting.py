"""Training one block: full precision to ternary, towards the teacher's states behind it.

A loop of its own and not transformers' Trainer: of what Trainer does, a block needs an optimizer and a
schedule alone. It is not evaluated on its way, it begins anew where it was stopped, and the run saves it
once; so a Trainer would be a module, a data set, a collator and switches that turn the rest off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from student.bitnet import Warmup, convert_layers, quantize_once, set_strengths
from student.blockwise.module import BlockModule, relative_errors
from student.errors import StudentError

# Measured on blocks of the demo teacher, see docs/bitnet.md.
WARMUP = Warmup(weights=0.3, activations=0.3)
BETAS = (0.9, 0.98)
RISE = 0.05  # share of the steps in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class BlockBatch:
    """What a step reads.

    Args:
        given: token ids int64 [B, T] for the first block, states float32 [B, T, D] for the others.
        target_BTD: the teacher's states behind the block.
        weight_BT: what each position counts; 0 for padding, and where the cache has no state.
    """

    given: Tensor
    target_BTD: Tensor  # noqa: N815
    weight_BT: Tensor  # noqa: N815

    def to(self, device: torch.device) -> BlockBatch:
        """On a device."""
        return BlockBatch(
            given=self.given.to(device),
            target_BTD=self.target_BTD.to(device),
            weight_BT=self.weight_BT.to(device),
        )


Read = Callable[[Sequence[int]], BlockBatch]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How blocks are trained. steps: of each; bf16: in bfloat16 autocast; bar: whether one is shown."""

    steps: int
    learning_rate: float
    batch_size: int
    bf16: bool
    bar: bool


def fit(module: BlockModule, read: Read, samples: Sequence[int], settings: FitSettings) -> None:
    """Train a converted block.

    Args:
        module: on its device; its weights change.
        read: makes a batch of samples.
        samples: of all steps, one after the other.
        settings: how.

    Raises:
        StudentError: the loss is not finite.
    """
    device = next(module.parameters()).device
    parameters = [parameter for _, parameter in module.trained()]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    name = f"block {module.block.number + 1}, {module.block}"
    module.train()
    for step in tqdm(range(settings.steps), name, leave=False, disable=not settings.bar):
        set_strengths(module, WARMUP.at(step, settings.steps))
        quantize_once(module)
        batch = read(samples[step * settings.batch_size : (step + 1) * settings.batch_size]).to(device)
        with computing(device, settings.bf16):
            states_BTD = module(batch.given)
        total, weight = relative_errors(states_BTD, batch.target_BTD, batch.weight_BT)
        loss = total / weight.clamp_min(1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    module.eval()
    final = float(loss.detach())
    if not math.isfinite(final):
        raise StudentError(f"{name}: its loss is {final}; lower --blockwise-learning-rate")


def rate(step: int, steps: int) -> float:
    """Share of the learning rate in the step that follows `step` finished ones: a rise, then a cosine."""
    return min(1.0, (step + 1) / (RISE * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def error(module: BlockModule, read: Read, batches: Iterable[Sequence[int]], bf16: bool) -> float:
    """Mean over the positions of some samples of the squared difference to the teacher, relative to the
    teacher's square.
    """
    device = next(module.parameters()).device
    quantize_once(module)
    total, weight = torch.zeros(2, dtype=torch.float64)
    for samples in batches:
        batch = read(samples).to(device)
        with computing(device, bf16):
            states_BTD = module(batch.given)
        part, counted = relative_errors(states_BTD, batch.target_BTD, batch.weight_BT)
        total, weight = total + part.double().cpu(), weight + counted.double().cpu()
    return float(total / weight)


def computing(device: torch.device, bf16: bool) -> Any:
    """Autocast, where it is on."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def convert_block(
    module: BlockModule, conversion: str, eps: float, read: Read, samples: Sequence[int], bf16: bool
) -> None:
    """Turn the linear layers of a block into ternary ones, with norms calibrated on some samples."""

    def run() -> None:
        device = next(module.parameters()).device
        for sample in samples:  # one by one, since padding would be calibrated on, too
            with computing(device, bf16):
                module(read([sample]).given.to(device))

    module.eval()
    convert_layers(module.layers, conversion, eps, run)
