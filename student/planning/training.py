"""What one training takes, for the device that it is to run on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import psutil
from torch import nn
from transformers import Trainer

from student.bitnet import BitLinear
from student.bitnet.int_mm import works
from student.data.indices import longest_places
from student.data.matched import collator_of
from student.errors import StudentError
from student.planned import PlannedDevice, planning_for
from student.planning import advice
from student.planning.blocks import BlockwiseWork, blockwise_work
from student.planning.memory import (
    FEW,
    Lasting,
    MemoryPlan,
    Setting,
    deeper,
    memory_plan,
    meter_bytes,
    ternary_bytes,
    trained_bytes,
)
from student.planning.optimizers import ROUNDING, OptimizerMemory, Parameter, optimizer_memory
from student.planning.sharding import gathered, shards
from student.planning.standin import (
    HEAD,
    LOSSES,
    Trace,
    alike,
    meta_model,
    meta_teachers,
    teacher_tensors,
    trace,
)
from student.planning.work import TrainingWork, measured_rate, plan_work
from student.sweep.capacity import CUDA_CONTEXT
from student.training.run import PreparedTraining


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the training is to run. memory: bytes of one device; here: whether this machine is it; sharded:
    whether processes share the weights.
    """

    on_gpu: bool
    memory: int
    processes: int
    here: bool
    sharded: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training takes.

    parameters: numbers of the student and what is trained beside it, as total, trained, frozen, ternary.
    memory: with the smallest chunks of the LM head. roomy: bytes of the peak where these are as large as a
    GPU of that memory lets them be. rate: FLOPs per second of this machine's products, None where the
    training is to run elsewhere. blockwise: what blocks take that are trained before, if any are. change: the
    smallest one with which it fits; None where it fits as it is, or nothing helps. least: all changes at
    once, where they do not help.
    """

    target: Target
    parameters: Mapping[str, int]
    setting: Setting
    memory: MemoryPlan
    roomy: int
    work: TrainingWork
    rate: float | None
    blockwise: BlockwiseWork | None
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

    @property
    def seconds_of_blocks(self) -> float | None:
        """Of their matrix products in one process, which is less than they take."""
        return self.blockwise.flops / self.rate if self.blockwise and self.rate else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        seconds = self.seconds_per_step
        tokens = self.work.tokens_per_step
        return {
            "parameters": dict(self.parameters),
            "setting": asdict(self.setting),
            "processes": self.target.processes,
            "memory": self.memory.to_json() | {"peak_bytes_with_large_chunks": self.roomy},
            "device_memory_bytes": self.target.memory,
            "fits": self.fits,
            "change": _change(self.change),
            "least": _change(self.least),
            "work": self.work.to_json(),
            "measured_flops_per_second": self.rate,
            "estimated_seconds_per_step": seconds,
            "estimated_tokens_per_second": tokens / seconds if seconds else None,
            "blockwise": self.blockwise.to_json() if self.blockwise else None,
            "estimated_seconds_of_blocks": self.seconds_of_blocks,
        }


def _change(change: advice.Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {"flags": list(change.flags), "peak_bytes": change.memory.peak}


def plan_training(prepared: PreparedTraining, target: Target) -> TrainingPlan:
    """Nothing of the student's size is ever in memory."""
    args, planner = prepared.request.training, _Planner(prepared, target)
    setting = Setting(
        rows=args.per_device_train_batch_size,
        accumulated=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing,
        optimizer=planner.optimizer_name,
        sharded=target.sharded,
    )
    memory = planner.evaluate(setting)
    change = least = None
    if not advice.fits(memory, target.memory):
        change = advice.smallest_change(setting, target.memory, planner.evaluate, planner.least)
        if change is None:
            smallest, flags = advice.least_setting(setting)
            least = advice.Change(smallest, flags, planner.evaluate(smallest))
    counts = _counts(planner.parameters)
    work = plan_work(prepared, planner.traced(setting), planner.positions(setting), setting, target.processes)
    return TrainingPlan(
        target=target,
        parameters=counts,
        setting=setting,
        memory=memory,
        roomy=planner.roomy(setting),
        work=work,
        rate=measured_rate(args.bf16 or args.fp16) if target.here else None,
        blockwise=blockwise_work(
            prepared.blockwise, setting.rows, work.tokens_per_epoch / work.samples, counts["ternary"]
        ),
        change=change,
        least=least,
    )


class _Planner:
    """Finds what settings of one training take."""

    def __init__(self, prepared: PreparedTraining, target: Target) -> None:
        self._prepared, self._target = prepared, target
        model = meta_model(prepared.plan, prepared.objective)
        self.parameters = parameters_of(model, model.student.get_decoder().layers)
        self._held = shards(self.parameters, target.processes) if target.sharded else self.parameters
        self._gathered = gathered(self.parameters) if target.sharded else None
        self._weights = sum(one.size for one in self._held) + sum(one.nbytes for one in model.buffers())
        tables = prepared.token_tables
        self._teacher = sum(one.nbytes for one in teacher_tensors(meta_teachers(prepared)))
        self._teacher += sum(one.nbytes for one in tables.tensors()) if tables is not None else 0
        self._layers = prepared.plan.config.get_text_config().num_hidden_layers
        self._depths = FEW if self._layers > FEW[-1] and alike(model) else (self._layers,)
        self.optimizer_name, self._optimizer_options = _optimizer(prepared)
        self._batch = cache(partial(longest_batch, prepared))
        self._followed = cache(self._follow)

    def positions(self, setting: Setting) -> int:
        """Of one pass, padding included."""
        return int(self._batch(setting.rows)["input_ids"].numel())

    def traced(self, setting: Setting, free: int = 0) -> Trace:
        """One pass. free: bytes that chunks of the LM head may go by."""
        return self._followed(setting.rows, setting.checkpointing, setting.accumulates, free)

    def evaluate(self, setting: Setting, free: int = 0) -> MemoryPlan:
        """free: as of `traced`."""
        optimizer, trace = self._optimizer(setting), self.traced(setting, free)
        return memory_plan(
            self._lasting(setting), optimizer, trace, setting, self._target.processes, self._gathered
        )

    def least(self, setting: Setting) -> int:
        """Bytes that a setting surely takes, without following a step."""
        copies = 1 + (self._target.processes > 1 and not self._target.sharded)
        gradients = copies * trained_bytes(self._held)
        ternary = ternary_bytes(self._held) + meter_bytes(self._held)
        return self._weights + gradients + ternary + self._optimizer(setting).state

    def roomy(self, setting: Setting) -> int:
        """The peak where the LM head has the chunks that the device's free memory allows; as that of
        `evaluate` on CPUs, and where nothing is free.
        """
        plan = self.evaluate(setting)
        if not self._target.on_gpu:
            return plan.peak
        before = sum(size for part, size in plan.moments[LOSSES].items() if part != HEAD)
        return self.evaluate(setting, max(0, self._target.memory - before)).peak

    def _follow(self, rows: int, checkpointing: bool, held: bool, free: int) -> Trace:
        # Whether a CPU does is found out with real numbers, so before a step is followed.
        device = PlannedDevice(integers=self._target.on_gpu or works("cpu"), free=free)
        step = partial(
            _trace,
            self._prepared,
            self._batch(rows),
            checkpointing=checkpointing,
            held=held,
            on_gpu=self._target.on_gpu,
        )
        with planning_for(device):
            traces = [step(depth) for depth in self._depths]
        return deeper(traces, self._layers)

    def _optimizer(self, setting: Setting) -> OptimizerMemory:
        low = {"optim_bits": 8} if setting.optimizer == advice.EIGHT_BIT else {}
        return optimizer_memory(
            setting.optimizer,
            self._optimizer_options | low,
            self._held,
            self._target.on_gpu,
            decays=self._prepared.request.training.weight_decay > 0,
        )

    def _lasting(self, setting: Setting) -> Lasting:
        # Trainer fetches all batches of a step, and accelerate another one, which stays in host memory.
        held = setting.accumulated + (not self._target.on_gpu)
        return Lasting(
            weights=self._weights,
            gradients=trained_bytes(self._held),
            ternary=ternary_bytes(self.parameters),  # also of shards: layers are multiplied whole
            meter=meter_bytes(self._held),
            teacher=self._teacher,
            batch=held * _bytes(self._batch(setting.rows)),
            process=_process(self._target),
        )


def parameters_of(model: nn.Module, decoder_layers: Iterable[nn.Module]) -> list[Parameter]:
    """Every tensor that a model trains or freezes, once."""
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    ternary = {id(one.weight) for one in model.modules() if isinstance(one, BitLinear)}
    layers = {id(one): number for number, layer in enumerate(decoder_layers) for one in layer.parameters()}
    return [
        Parameter(
            shape=tuple(one.shape),
            item=one.element_size(),
            trained=one.requires_grad,
            embedding=id(one) in embeddings,
            ternary=id(one) in ternary,
            layer=layers.get(id(one)),
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


def longest_batch(prepared: PreparedTraining, rows: int) -> dict[str, Any]:
    """The longest training samples: what takes most."""
    data = prepared.data
    longest = longest_places(prepared.reader.lengths, data.split.training, rows)
    collator = collator_of(data.train, 0, prepared.request.options.pack_rows, drop_idle=True)
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
