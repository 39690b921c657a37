"""How many steps a training has, how many tokens and FLOPs, and how long its matrix products take here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from distily.system.machine import product_seconds
from student.config.precision import product_rate
from student.data.indices import indices_at, lengths_of
from student.planning.memory import Setting
from student.planning.standin import Trace
from student.training.resume import order_seed
from student.training.run import PreparedTraining

_LOOKED_AT = 2**17  # samples of an epoch
_SIDE = 4096  # of the matrices that a GPU multiplies


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """Of all processes together.

    tokens_per_step: of samples, on average. positions_per_step: with padding. flops_per_step: of matrix
    products and attention, those of recomputed layers included.
    """

    samples: int
    steps: int
    steps_per_epoch: int
    tokens_per_epoch: int
    tokens_per_step: float
    positions_per_step: float
    flops_per_step: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_work(
    prepared: PreparedTraining, trace: Trace, positions: int, setting: Setting, processes: int
) -> TrainingWork:
    """positions: of the batch that was followed, padding included. Padding is that of the first samples of
    the first epoch, up to _LOOKED_AT.
    """
    args, data = prepared.request.training, prepared.data
    samples = len(data.train)
    batch = setting.rows * setting.accumulated * processes
    whole = samples // batch if args.dataloader_drop_last else -(-samples // batch)
    per_epoch = max(1, whole)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    tokens = sum(int(part.sum()) for part in lengths_of(prepared.reader.lengths, data.split.training))
    padded = float(tokens)
    if not prepared.request.options.pack_rows:
        order = data.train.epoch_order(order_seed(args), 0)
        places = np.fromiter(islice(order, _LOOKED_AT), np.int64)
        lengths = prepared.reader.lengths[indices_at(data.split.training, places)]
        padded = padded_positions(lengths.tolist(), setting.rows) * (tokens / int(lengths.sum()))
    if prepared.tokens is not None:  # lengths are those of the teacher's tokens
        tokens, padded = round(tokens * prepared.tokens.expansion), padded * prepared.tokens.expansion
    return TrainingWork(
        samples=samples,
        steps=steps,
        steps_per_epoch=per_epoch,
        tokens_per_epoch=tokens,
        tokens_per_step=tokens / per_epoch,
        positions_per_step=padded / per_epoch,
        flops_per_step=trace.flops / positions * padded / per_epoch,
    )


def padded_positions(lengths: Sequence[int], rows: int) -> int:
    """Of samples in this order, each batch of `rows` padded to its longest."""
    batches = (lengths[start : start + rows] for start in range(0, len(lengths), rows))
    return sum(len(batch) * max(batch) for batch in batches)


def measured_rate(bf16: bool) -> float:
    """FLOPs per second of matrix products on this machine's device, in bfloat16 or float32."""
    dtype = "bfloat16" if bf16 else "float32"
    return _gpu_rate(dtype) if torch.cuda.is_available() else product_rate(dtype)


def _gpu_rate(dtype: str) -> float:
    matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype), device="cuda")

    def product(_: str) -> None:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()

    where = f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {_SIDE}"
    return 2.0 * _SIDE**3 / product_seconds((dtype,), product, where)[dtype]
