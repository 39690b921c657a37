"""What a request leaves open, chosen by what this machine does fast: compute type, step and shard sizes."""

from __future__ import annotations

import os
from dataclasses import replace

from distily.system.gpu import hidden_gpus
from pipeline.errors import RequestError
from pipeline.generate.pace import (
    FIRST_SHARD_SECONDS,
    SHARD_SECONDS,
    SHARD_TOKENS,
    STEP_SECONDS,
    STEP_TOKENS,
    Pace,
    matrix_product_rates,
    rough_pace,
)
from pipeline.generate.precision import Precision, choose_precision
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import Teacher, count_parameters

# Each holds a shard, and four encode what a teacher of 1B computes on an H100.
_MOST_ENCODERS = 4


def settle(
    request: GenerateRequest, teacher: Teacher, stored: str | None
) -> tuple[GenerateRequest, Precision, int]:
    """The request with nothing left open, why its compute type was chosen, and positions of the first shard.

    On a GPU the teacher computes in the type that it is saved in, and sizes are the defaults.

    Args:
        stored: compute type of the rows that the store at `--out` holds; None where it holds none.

    Raises RequestError where the machine has a GPU that torch does not see.
    """
    import psutil
    import torch

    parameters = count_parameters(teacher)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and (problem := hidden_gpus('CUDA_VISIBLE_DEVICES=""')):
        raise RequestError(problem)
    precision = choose_precision(
        request.dtype,
        teacher.config_dtype,
        stored=stored,
        quantised=on_gpu or request.in_fewer_bits or teacher.quantization != "none",
        parameters=parameters,
        free_memory=psutil.virtual_memory().available,
        rates=matrix_product_rates,
    )
    request = replace(request, dtype=precision.dtype)
    if on_gpu:
        return request, precision, request.shard_size
    pace = rough_pace(matrix_product_rates()[precision.dtype] / request.data_parallel, parameters)
    return sized(request, pace), precision, pace.tokens(FIRST_SHARD_SECONDS, SHARD_TOKENS)


def sized(request: GenerateRequest, pace: Pace) -> GenerateRequest:
    """The request with sizes that keep steps and shards short at this pace; sizes that were given stay."""
    return replace(
        request,
        max_num_batched_tokens=request.max_num_batched_tokens or pace.tokens(STEP_SECONDS, STEP_TOKENS),
        shard_tokens=request.shard_tokens or pace.tokens(SHARD_SECONDS, SHARD_TOKENS),
    )


def encoders(tensor_parallel_size: int, data_parallel: int) -> int:
    """How many threads encode the shards of an engine: one for each core of its share that a teacher on GPUs
    leaves over, from 1 to 4.

    vLLM's workers, its scheduler and the thread that feeds it have a core each. On a CPU the teacher has use
    for all cores, and one thread encodes far more than it computes.
    """
    import torch

    if not torch.cuda.is_available():
        return 1
    spare = len(os.sched_getaffinity(0)) // data_parallel - tensor_parallel_size - 2
    return min(max(spare, 1), _MOST_ENCODERS)
