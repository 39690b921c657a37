"""`distily-train plan`: from a request that `from-cache` would take to what it would cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import psutil
import torch
from torch import nn
from transformers import Trainer

from student.bitnet import BitLinear
from student.config.parser import parse
from student.config.recipes import StageRequest, requests, take_recipe
from student.data.batches import Collator
from student.errors import StudentError, UserError
from student.modeling.plan import StudentPlan
from student.planning import advice
from student.planning.memory import (
    FEW,
    Lasting,
    MemoryPlan,
    Setting,
    deeper,
    memory_plan,
    ternary_bytes,
    trained_bytes,
)
from student.planning.optimizers import ROUNDING, Parameter, optimizer_memory
from student.planning.standin import Trace, meta_model, meta_teacher, teacher_tensors, trace
from student.planning.work import Work, measured_rate, plan_work
from student.sweep.capacity import CUDA_CONTEXT
from student.training.outputs import check_output
from student.training.run import PreparedTraining, prepare

NOWHERE = "trainer_output"  # where --output-dir is left out; nothing is written there
_PRECISIONS = {"--bf16", "--no-bf16", "--fp16", "--use-cpu"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the training is to run. memory: bytes of one device; here: whether this machine is it."""

    on_gpu: bool
    memory: int
    processes: int
    here: bool


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training takes.

    parameters: numbers of the student and what is trained beside it, as total, trained, frozen, ternary.
    rate: FLOPs per second of this machine's products, None where the training is to run elsewhere. change:
    the smallest one with which it fits; None where it fits as it is, or nothing helps. least: all changes
    at once, where they do not help.
    """

    target: Target
    parameters: Mapping[str, int]
    setting: Setting
    memory: MemoryPlan
    work: Work
    rate: float | None
    change: advice.Change | None
    least: advice.Change | None

    @property
    def fits(self) -> bool:
        """Whether it fits as it is."""
        return advice.fits(self.memory, self.target.memory)

    @property
    def seconds_per_step(self) -> float | None:
        """Of the matrix products of one process, which is less than a step takes."""
        if self.rate is None:
            return None
        return self.work.flops_per_step / self.target.processes / self.rate

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        seconds = self.seconds_per_step
        tokens = self.work.tokens_per_step
        return {
            "parameters": dict(self.parameters),
            "setting": asdict(self.setting),
            "processes": self.target.processes,
            "memory": self.memory.to_json(),
            "device_memory_bytes": self.target.memory,
            "fits": self.fits,
            "change": _change(self.change),
            "least": _change(self.least),
            "work": self.work.to_json(),
            "measured_flops_per_second": self.rate,
            "estimated_seconds_per_step": seconds,
            "estimated_tokens_per_second": tokens / seconds if seconds else None,
        }


def _change(change: advice.Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {"flags": list(change.flags), "peak_bytes": change.memory.peak}


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
    recipe, words = take_recipe(words)
    asked = parse(words) if recipe is None else requests(recipe, words)
    stages = asked if isinstance(asked, list) else [StageRequest("", asked)]
    target = target_of(gpu_memory, processes, stages[0].request.training.world_size)
    plans: dict[str, TrainingPlan] = {}
    before: StudentPlan | None = None
    for stage in stages:
        if placed:
            check_output(stage.request)
        prepared = prepare(stage.request, before)
        before = prepared.plan
        plans[stage.name] = plan_training(prepared, target)
    return plans


def _flags(argv: Sequence[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in argv}


def target_of(gpu_memory: float | None, processes: int | None, world_size: int) -> Target:
    """The devices that were asked for, else this machine's. gpu_memory: GiB of one GPU."""
    if gpu_memory is not None and not 0 < gpu_memory < float("inf"):
        raise UserError(f"--gpu-memory {gpu_memory:g}: give the GiB of one GPU, e.g. 24")
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    here = torch.cuda.is_available()
    if gpu_memory is not None:
        memory = int(gpu_memory * 2**30)
    elif here:
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_gpu = here or gpu_memory is not None
    return Target(on_gpu=on_gpu, memory=memory, processes=processes or world_size, here=here or not on_gpu)


def plan_training(prepared: PreparedTraining, target: Target) -> TrainingPlan:
    """Nothing of the student's size is ever in memory."""
    args, process = prepared.request.training, _process(target)
    name, options = _optimizer(prepared)
    setting = Setting(
        rows=args.per_device_train_batch_size,
        accumulated=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing,
        optimizer=name,
    )
    model = meta_model(prepared.plan, prepared.objective)
    parameters = parameters_of(model)
    weights = sum(one.size for one in parameters) + sum(one.nbytes for one in model.buffers())
    teacher = sum(one.nbytes for one in teacher_tensors(meta_teacher(prepared)))
    layers = prepared.plan.config.get_text_config().num_hidden_layers
    batches = cache(partial(_batch, prepared))

    def lasting(rows: int) -> Lasting:
        return Lasting(
            weights=weights,
            gradients=trained_bytes(parameters),
            ternary=ternary_bytes(parameters),
            teacher=teacher,
            batch=_bytes(batches(rows)),
            process=process,
        )

    def optimizer(setting: Setting) -> Any:
        made = options | ({"optim_bits": 8} if setting.optimizer == advice.EIGHT_BIT else {})
        return optimizer_memory(setting.optimizer, made, parameters, target.on_gpu)

    @cache
    def followed(rows: int, checkpointing: bool, held: bool) -> Trace:
        depths = FEW if layers > FEW[-1] else (layers,)
        step = partial(_trace, prepared, batches(rows), checkpointing=checkpointing, held=held)
        return deeper([step(depth) for depth in depths], layers)

    def traced(setting: Setting) -> Trace:
        held = setting.holds_gradients
        return followed(setting.rows, setting.checkpointing, held)

    def evaluate(setting: Setting) -> MemoryPlan:
        rows = lasting(setting.rows)
        return memory_plan(rows, optimizer(setting), traced(setting), setting, target.processes)

    def least(setting: Setting) -> int:
        copies = 1 + (target.processes > 1)
        gradients = copies * trained_bytes(parameters)
        return int(weights + gradients + optimizer(setting).state + ternary_bytes(parameters))

    memory = evaluate(setting)
    change = all_of_them = None
    if not advice.fits(memory, target.memory):
        change = advice.smallest_change(setting, target.memory, evaluate, least)
        if change is None:
            smallest, flags = advice.least_setting(setting)
            all_of_them = advice.Change(smallest, flags, evaluate(smallest))
    positions = batches(setting.rows)["input_ids"].numel()
    return TrainingPlan(
        target=target,
        parameters=_counts(parameters),
        setting=setting,
        memory=memory,
        work=plan_work(prepared, traced(setting), positions, setting, target.processes),
        rate=measured_rate(args.bf16 or args.fp16) if target.here else None,
        change=change,
        least=all_of_them,
    )


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Every tensor that a model trains or freezes, once."""
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    ternary = {id(one.weight) for one in model.modules() if isinstance(one, BitLinear)}
    return [
        Parameter(
            shape=tuple(one.shape),
            item=one.element_size(),
            trained=one.requires_grad,
            embedding=id(one) in embeddings,
            ternary=id(one) in ternary,
        )
        for one in model.parameters()
    ]


def _counts(parameters: list[Parameter]) -> dict[str, int]:
    total, trained = (sum(one.count for one in parameters if one.trained in kept) for kept in ((0, 1), (1,)))
    ternary = sum(one.count for one in parameters if one.ternary)
    return {"total": total, "trained": trained, "frozen": total - trained, "ternary": ternary}


def _optimizer(prepared: PreparedTraining) -> tuple[str, dict[str, Any]]:
    if prepared.plan.masters == "bf16":
        return ROUNDING, {}
    args = prepared.request.training
    name = str(args.optim.value)
    try:
        return name, dict(Trainer.get_optimizer_cls_and_kwargs(args)[1])
    except ValueError:  # one that wants a model, which `optimizer_memory` does not know
        return name, {}


def _batch(prepared: PreparedTraining, rows: int) -> dict[str, Any]:
    """The longest training samples: what takes most."""
    data, lengths = prepared.data, prepared.reader.lengths
    longest = sorted(range(len(data.train)), key=lambda place: -lengths[data.split.training[place]])[:rows]
    collator = Collator(data.train.groups, 0, prepared.request.options.pack_rows, drop_idle=True)
    return collator([data.train[place] for place in longest])


def _bytes(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return sum(map(_bytes, batch.values()))
    return int(batch.nbytes)


def _trace(prepared: PreparedTraining, *args: Any, **options: Any) -> Trace:
    """As of `standin.trace`; StudentError for a student whose code asks for numbers."""
    try:
        return trace(prepared, *args, **options)
    except (RuntimeError, NotImplementedError) as error:
        kind = prepared.plan.config.model_type
        raise StudentError(
            f"a step of a {kind} student cannot be followed without its numbers ({type(error).__name__}), so "
            "its memory is not known; train a few steps and read summary.json"
        ) from error


def _process(target: Target) -> int:
    """Bytes beside tensors."""
    if target.on_gpu:
        return CUDA_CONTEXT
    return int(psutil.Process().memory_info().rss)
