"""The device of a training or an evaluation, and the type that it computes in: what the machine does fast.

On a GPU with fast bfloat16 a training runs under bfloat16 autocast, and float32 products in TF32. On a CPU it
does so only where bfloat16 products were measured faster than float32 ones: with AVX2 alone they are several
times slower. Weights are float32 either way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils.import_utils import enable_tf32

from distily.system.gpu import hidden_gpus
from distily.system.machine import WORTHWHILE, fast_dtype, product_seconds
from student.errors import UserError

FLOAT32, BFLOAT16 = "float32", "bfloat16"
# Positions, inputs and outputs of the product that is measured: about those of a small student's layer.
_SHAPE = (256, 768, 2304)
_AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Whether to train under bfloat16 autocast and with TF32 products, and why, in one line."""

    bf16: bool
    tf32: bool
    line: str


def find_gpu(uses_cpu: str) -> bool:
    """Whether torch sees a GPU; UserError where the machine has one that torch does not see, so that nothing
    runs on the CPU for hours unasked. uses_cpu: how the user asks for the CPU, in words.
    """
    if torch.accelerator.is_available():
        return True
    if problem := hidden_gpus(uses_cpu):
        raise UserError(problem)
    return False


_BY_VARIABLE = 'CUDA_VISIBLE_DEVICES=""'


def inference_device() -> str:
    """Of a model that is evaluated or talked to; UserError as of `find_gpu`."""
    find_gpu(_BY_VARIABLE)
    return "cuda" if torch.cuda.is_available() else "cpu"


def uses_cpu(asked: bool | None) -> bool:
    """The value of --use-cpu where it was left out (None)."""
    if asked is not None:
        return asked
    if string_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false"):
        return True
    return not find_gpu(f"--use-cpu or {_BY_VARIABLE}")


def product_times() -> dict[str, float]:
    """Seconds of a matrix product on the CPU in float32 and in bfloat16, measured once per machine."""
    rows, inputs, outputs = _SHAPE

    def product(dtype: str) -> None:
        kind = getattr(torch, dtype)
        torch.nn.functional.linear(
            torch.ones(rows, inputs, dtype=kind), torch.ones(outputs, inputs, dtype=kind)
        )

    where = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads"
    return product_seconds((FLOAT32, BFLOAT16), product, where)


def product_rate(dtype: str) -> float:
    """FLOPs per second of that product on the CPU, in float32 or bfloat16."""
    return 2.0 * math.prod(_SHAPE) / product_times()[dtype]


def choose(asked: bool | None, *, fp16: bool, on: str, capability: tuple[int, int] | None = None) -> Choice:
    """What to train in.

    Args:
        asked: of bfloat16 autocast, None where it was left open.
        fp16: whether float16 autocast was asked for.
        on: the type of the device.
        capability: of a CUDA device.
    """
    if on == "cuda":
        fast = capability is not None and capability >= _AMPERE
        bf16 = fast and not fp16 if asked is None else asked
        type_ = "float16 autocast" if fp16 else "bfloat16 autocast" if bf16 else FLOAT32
        overrides = "--no-bf16 and --tf32 False override this" if fast else "this GPU has no fast bfloat16"
        return Choice(bf16=bf16, tf32=fast, line=f"training in {type_} on the GPU; {overrides}")
    if on != "cpu":
        return Choice(
            bf16=bool(asked), tf32=False, line=f"training in {BFLOAT16 if asked else FLOAT32} on {on}"
        )
    return _on_cpu(asked, product_times())


def _on_cpu(asked: bool | None, seconds: Mapping[str, float]) -> Choice:
    ratio = seconds[BFLOAT16] / seconds[FLOAT32]
    faster = ratio * WORTHWHILE < 1
    bf16 = faster if asked is None else asked
    speed = f"{ratio:.1f} times slower" if ratio >= 1 else f"{1 / ratio:.1f} times faster"
    line = f"training in {'bfloat16 autocast' if bf16 else FLOAT32} on the CPU"
    if asked is None:
        line += f", where bfloat16 products are {speed} than float32; {'--no-bf16' if bf16 else '--bf16'} "
        line += "overrides this"
    elif asked and ratio > WORTHWHILE:
        line += f" as asked, where bfloat16 products are {speed} than float32; --no-bf16 would be faster"
    return Choice(bf16=bf16, tf32=False, line=line)


def settle(args: TrainingArguments, asked: bool | None) -> list[str]:
    """Put precision and device of `args` right; what to tell the user. asked: the value of --bf16, None where
    it was left open.

    The first of several processes decides for all of them.
    """
    device = args.device
    if asked is None and args.mixed_precision == "bf16":  # `accelerate launch --mixed_precision bf16`
        asked = True
    fp16 = args.mixed_precision == "fp16"
    if fp16 and device.type == "cpu":
        raise UserError(
            "--fp16: float16 autocast needs a GPU, a CPU would compute everything in float32; leave it "
            "out, or use --bf16"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    choice = choose(asked, fp16=fp16, on=device.type, capability=capability)
    if args.world_size > 1:
        from accelerate.utils import broadcast_object_list

        choice = broadcast_object_list([choice])[0]
    args.bf16 = choice.bf16
    if not fp16:
        args.mixed_precision = "bf16" if choice.bf16 else "no"
    if choice.tf32 and args.tf32 is None:
        args.tf32 = True
        enable_tf32(True)
    return [choice.line, *_one_gpu(args)]


def _one_gpu(args: TrainingArguments) -> list[str]:
    """One process uses one GPU: nn.DataParallel, which Trainer would use, breaks the losses."""
    gpus = args.n_gpu
    if gpus <= 1:
        return []
    args._n_gpu = 1
    return [
        f"this process uses one of {gpus} GPUs; all of them: accelerate launch --multi_gpu --num_processes "
        f"{gpus} -m student.cli from-cache ..."
    ]


def inference_dtype(saved: str) -> str:
    """What a model saved in `saved` is run in: as saved, but for a CPU that is slow at it."""
    if torch.cuda.is_available() or saved != BFLOAT16:
        return saved
    return fast_dtype(saved, product_times())
