"""`distily-train plan`: from a request that `from-cache` would take to what it would cost."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from student.config.parser import parse
from student.config.recipes import StageRequest, requests, take_recipe
from student.config.sharding import check_optimizer
from student.errors import UserError
from student.modeling.plan import StudentPlan
from student.planning.training import Target, TrainingPlan, plan_training
from student.training.outputs import check_output
from student.training.run import prepare

SHARDED = "--fsdp"  # only several processes may train so, and this is one that plans for them
NOWHERE = "trainer_output"  # where --output-dir is left out; nothing is written there
_PRECISIONS = {"--bf16", "--no-bf16", "--fp16", "--use-cpu"}


def plan_command(
    argv: Sequence[str], gpu_memory: float | None, processes: int | None
) -> dict[str, TrainingPlan]:
    """What the words of `from-cache` ask for, by stage; "" where there are none.

    UserError for whatever `from-cache` refuses before it trains.
    """
    placed = any(word.replace("_", "-").startswith("--output-dir") for word in argv)
    words = list(argv) if placed else [*argv, f"--output-dir={NOWHERE}"]
    if gpu_memory is not None and not torch.cuda.is_available() and not _PRECISIONS & _flags(argv):
        words.append("--bf16=True")  # as on any GPU of today
    sharded = SHARDED in words
    recipe, words = take_recipe([word for word in words if word != SHARDED])
    asked = parse(words) if recipe is None else requests(recipe, words)
    stages = asked if isinstance(asked, list) else [StageRequest("", asked)]
    target = target_of(gpu_memory, processes, stages[0].request.training.world_size, sharded)
    plans: dict[str, TrainingPlan] = {}
    before: StudentPlan | None = None
    for stage in stages:
        if sharded:
            check_optimizer(str(stage.request.training.optim.value))
        if placed:
            check_output(stage.request)
        prepared = prepare(stage.request, before)
        before = prepared.plan
        plans[stage.name] = plan_training(prepared, target)
    return plans


def _flags(argv: Sequence[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in argv}


def target_of(
    gpu_memory: float | None = None, processes: int | None = None, world_size: int = 1, sharded: bool = False
) -> Target:
    """The devices that were asked for, else this machine's. gpu_memory: GiB of one GPU."""
    if gpu_memory is not None and not 0 < gpu_memory < float("inf"):
        raise UserError(f"--gpu-memory {gpu_memory:g}: give the GiB of one GPU, e.g. 24")
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    processes = processes or world_size
    if sharded and processes < 2:
        raise UserError(f"{SHARDED} shards the student over processes; give --processes 2 or more")
    here = torch.cuda.is_available()
    if gpu_memory is not None:
        memory = int(gpu_memory * 2**30)
    elif here:
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_gpu = here or gpu_memory is not None
    return Target(on_gpu=on_gpu, memory=memory, processes=processes, here=gpu_memory is None, sharded=sharded)
