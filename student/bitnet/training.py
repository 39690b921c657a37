"""What a BitNet student needs of the training loop, as one callback of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback

from student.bitnet.annealing import Annealing
from student.bitnet.backward import EVERY, Gate, Gates
from student.bitnet.linear import (
    bit_linears,
    quantize_always,
    quantize_in_passes,
    quantize_once,
    set_strengths,
    set_temperature,
)
from student.bitnet.meter import FlipMeter
from student.bitnet.warmup import Warmup
from student.errors import StudentError
from student.shards import is_sharded, over_all, rows

# Of the learning rate, in the second stage: the ratio of both stages' peaks, for all four sizes of Table 2 in
# "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Ma, Wang and Wei 2024).
LATE_RATE = 2 / 3


def late(step: int, max_steps: int) -> bool:
    """Whether the step that follows `step` finished ones belongs to the second half of the run."""
    return 2 * step >= max_steps


@dataclass(frozen=True)
class TernaryPlan:
    """How a BitNet student is trained. masters: dtype of the latent weights, see `bitnet.masters`.

    two_stage: in the second half of the steps weight decay is 0 and the learning rate LATE_RATE of what the
    schedule says, as BitNet b1.58 (arXiv:2402.17764) was trained. backward: full or int8, see
    `bitnet.backward`. learning_rate, weight_decay: of the latent weights, see `separate_rates`. annealing:
    how their softened form hardens.
    """

    warmup: Warmup = field(default_factory=Warmup)
    masters: str = "fp32"
    two_stage: bool = False
    backward: str = "full"
    learning_rate: float | None = None
    weight_decay: float | None = None
    annealing: Annealing = field(default_factory=Annealing)


class TernaryCallback(TrainerCallback):  # type: ignore[misc]
    """Strengths before a step, quantisation once per step, weight decay by stage, and what is logged."""

    def __init__(self, student: nn.Module, plan: TernaryPlan) -> None:
        self._student, self._plan = student, plan
        self.meter = FlipMeter(student)
        # Since the last log: of steps, and of those whose gradients were not zero.
        self._largest_rate, self._largest_moving = 0.0, torch.zeros(())
        self._quantise = quantize_in_passes if is_sharded(student) else quantize_once
        self._compares = True  # whether gates do so in this step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After weights were loaded or sent between processes."""
        self._quantise(self._student)
        self.meter.look()
        self._compares = True
        if self._plan.backward == "int8":
            set_gates(self._student, Gates)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Strengths and weight decay are functions of the step, so that a resumed run has the right ones."""
        step, max_steps = state.global_step, state.max_steps
        set_strengths(self._student, self._plan.warmup.at(step, max_steps))
        set_temperature(self._student, self._plan.annealing.at(step, max_steps))
        if self._plan.two_stage and late(state.global_step, state.max_steps):
            for group in kwargs["optimizer"].param_groups:
                group["weight_decay"] = 0.0
        for gate in gates(self._student):
            gate.check(state.global_step % EVERY == 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, and the rate that they will meet."""
        weights = [layer.weight for _, layer in bit_linears(self._student)]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        latent = set(map(id, weights))
        groups = kwargs["optimizer"].param_groups
        rate = max(float(group["lr"]) for group in groups if not latent.isdisjoint(map(id, group["params"])))
        if rate > self._largest_rate and grads:
            self._largest_rate = rate
            # Left on the device, for which nobody waits here.
            moving = torch.stack([rows(grad).values.any() for grad in grads]).any() * rate
            self._largest_moving = self._largest_moving.to(moving).maximum(moving)
        if self._compares or state.global_step % EVERY == 0:
            agree(gates(self._student), args.device)
        self._compares = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have changed, perhaps without a trace."""
        self._quantise(self._student)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nobody promises to tell of changes any more."""
        quantize_always(self._student)
        set_gates(self._student, lambda: None)

    def measure(self, peak_rate: float) -> dict[str, float]:
        """What `FlipMeter.measure` says since the last log and `gate_metrics` of the last comparison;
        StudentError when updates vanish in rounding.

        That is, when no latent weight moved though some step had gradients and at least half the peak
        learning rate: at the ends of a schedule a standstill is no fault.
        """
        peak_rate = self._plan.learning_rate or peak_rate
        measured = self.meter.measure()
        _, first = next(bit_linears(self._student))
        moving = self._largest_moving.to(first.weight.device)
        rate = float(over_all(moving, first.weight, distributed.ReduceOp.MAX))
        self._largest_rate, self._largest_moving = 0.0, torch.zeros(())
        if measured["bitnet_moved_share"] == 0 and rate > 0 and rate >= peak_rate / 2:
            dtype = str(first.weight.dtype)
            flag = "--learning-rate" if self._plan.learning_rate is None else "--bitnet-learning-rate"
            raise StudentError(
                f"no latent weight moved since the last log, at a learning rate of {rate:g}: its updates are "
                f"smaller than the rounding of {dtype.removeprefix('torch.')} weights; raise {flag}"
                + (" or take --bitnet-masters fp32" if dtype != "torch.float32" else "")
            )
        return measured | gate_metrics(gates(self._student))


def set_gates(model: nn.Module, make: Callable[[], Gates | None]) -> None:
    """New ones for each BitLinear layer."""
    for _, layer in bit_linears(model):
        layer.gates = make()


def gates(model: nn.Module) -> list[Gate]:
    """All gates of a model's layers."""
    found = (layer.gates for _, layer in bit_linears(model))
    return [gate for both in found if both is not None for gate in (both.inputs, both.weights)]


def agree(found: Sequence[Gate], device: torch.device) -> None:
    """Give each gate the lowest cosine of all processes, so that the same products are left to int8 in all,
    as they would be where one process took all samples of the step.
    """
    if not found or not distributed.is_available() or not distributed.is_initialized():
        return
    unknown = 2.0
    known = [unknown if gate.cosine is None else gate.cosine for gate in found]
    cosines = torch.tensor(known, dtype=torch.float64, device=device)
    distributed.all_reduce(cosines, distributed.ReduceOp.MIN)
    for gate, cosine in zip(found, cosines.tolist(), strict=True):
        gate.cosine = None if cosine == unknown else cosine


def gate_metrics(found: Sequence[Gate]) -> dict[str, float]:
    """Lowest cosine of an int8 product to the full one, and how many products are not left to int8; nothing
    before the first comparison.
    """
    cosines = [gate.cosine for gate in found if gate.cosine is not None]
    if not cosines:
        return {}
    shut = sum(not gate.open for gate in found)
    return {"bitnet_backward_cosine_min": min(cosines), "bitnet_backward_fallbacks": float(shut)}


def staged(schedule: torch.optim.lr_scheduler.LambdaLR, max_steps: int) -> None:
    """Give a schedule its second stage."""

    def with_stage(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step) * (LATE_RATE if late(step, max_steps) else 1.0)

    schedule.lr_lambdas = [with_stage(rate) for rate in schedule.lr_lambdas]


def separate_rates(optimizer: torch.optim.Optimizer, model: nn.Module, plan: TernaryPlan) -> None:
    """Move the latent weights of a model into groups of an optimizer of their own, which come last and have
    the plan's learning rate and weight decay; what the plan leaves open stays as it is.

    To be called before the optimizer's first step, and before a schedule is made of its rates.
    """
    if plan.learning_rate is None and plan.weight_decay is None:
        return
    own = {"lr": plan.learning_rate, "weight_decay": plan.weight_decay}
    own = {name: value for name, value in own.items() if value is not None}
    latent = {id(layer.weight) for _, layer in bit_linears(model)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in latent]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in latent]
            optimizer.add_param_group({**group, "params": moved, **own})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
