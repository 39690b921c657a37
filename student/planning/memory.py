"""The memory of one process of a training, by part. Pure: bytes in, bytes out.

A step has a few moments at which it may be fullest: in the decoder, in the losses, where the backward pass
begins, where it ends, and in the optimizer. Each is linear in the number of decoder layers, so two stand-ins
of few layers tell what any number takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student.planning.optimizers import OptimizerMemory, Parameter
from student.planning.sharding import IN_BACKWARD, IN_FORWARD, IN_LOSSES, Gathered
from student.planning.standin import AROUND, FORWARD, GRADIENTS, LOSSES, REST, TERNARY, TOP, Trace
from student.planning.tracking import Moment

FEW = (2, 3)  # layers of the stand-ins
UPDATE, EXCHANGE = "optimizer", "exchange of gradients"
GATHERED = "gathered weights"
_SAMPLE = 4096  # weights per layer whose movement is watched, see student.bitnet.meter
_SCALE = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a training can be changed to make it fit.

    rows: samples of a process in one pass; accumulated: passes of an optimizer step; optimizer: of
    `student.planning.optimizers`. sharded: whether processes share the weights, which is not changed.
    """

    rows: int
    accumulated: int
    checkpointing: bool
    optimizer: str
    sharded: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether gradients and ternary weights of earlier passes are there before a pass."""
        return self.accumulated > 1


@dataclass(frozen=True, kw_only=True)
class Lasting:
    """Bytes that are there all the time, and of what comes and goes: all gradients, all ternary weights.

    meter: of what flips are counted by. batch: of all batches that are held. process: of the process beside
    its tensors: libraries, or the context of a GPU.
    """

    weights: int
    gradients: int
    ternary: int
    meter: int
    teacher: int
    batch: int
    process: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by moment of a step and part, as far as a part takes any at some moment.

    paged: of the optimizer's state in host memory, in no moment.
    """

    moments: Mapping[str, Mapping[str, int]]
    paged: int

    @property
    def moment(self) -> str:
        """The fullest one."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> Mapping[str, int]:
        """All parts at the fullest moment."""
        return self.moments[self.moment]

    @property
    def whole(self) -> Mapping[str, int]:
        """The most of each part at any moment."""
        return {part: max(each[part] for each in self.moments.values()) for part in self.at_peak}

    @property
    def peak(self) -> int:
        """Of one process."""
        return sum(self.at_peak.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak,
            "moment": self.moment,
            "at_peak": dict(self.at_peak),
            "whole": dict(self.whole),
            "optimizer_state_in_host_memory": self.paged,
        }


def trained_bytes(parameters: Sequence[Parameter]) -> int:
    """Of all gradients."""
    return sum(one.size for one in parameters if one.trained)


def ternary_bytes(parameters: Sequence[Parameter]) -> int:
    """Of the ternary weights that a BitNet student multiplies by, int8 with a scale."""
    return sum(one.count + _SCALE for one in parameters if one.ternary)


def meter_bytes(parameters: Sequence[Parameter]) -> int:
    """Of what `student.bitnet.FlipMeter` compares with: two bits of each ternary weight, the first scale and
    the sample of each layer.
    """
    total = 0
    for one in parameters:
        if one.ternary:
            stride = max(1, one.count // _SAMPLE)
            total += -(-one.count // 4) + _SCALE + -(-one.count // stride) * one.item
    return total


def deeper(traces: Sequence[Trace], layers: int) -> Trace:
    """What `layers` decoder layers take, from traces of FEW layers, or from one of all of them."""
    if len(traces) == 1:
        return traces[0]
    fewer, more = traces
    far = layers - FEW[0]

    def line(low: int, high: int) -> int:
        return max(0, low + far * (high - low))

    moments = {}
    for segment, moment in more.moments.items():
        before = fewer.moments.get(segment, Moment()).bytes
        labels = {*before, *moment.bytes}
        moments[segment] = Moment(
            {label: line(before.get(label, 0), moment.bytes.get(label, 0)) for label in labels}
        )
    return Trace(moments, line(fewer.flops, more.flops))


def memory_plan(
    lasting: Lasting,
    optimizer: OptimizerMemory,
    trace: Trace,
    setting: Setting,
    processes: int,
    gathered: Gathered | None = None,
) -> MemoryPlan:
    """The moments of a step, once the optimizer has its state.

    Several processes exchange gradients in buckets, which are a copy of them (DistributedDataParallel),
    unless they share the weights: gathered is what each has whole then, and `lasting` and `optimizer` are of
    shards.
    """
    always = {
        "weights": lasting.weights,
        "optimizer state": optimizer.state,
        "meter of flips": lasting.meter,
        "teacher's weights": lasting.teacher,
        "batch": lasting.batch,
        "gradient buckets": lasting.gradients if processes > 1 and gathered is None else 0,
        "process": lasting.process,
    }
    kept = {GRADIENTS: lasting.gradients, TERNARY: lasting.ternary}
    moments = {}
    for name, traced in trace.moments.items():
        moment = dict(traced.bytes)
        around, layers = moment.pop(AROUND, 0), moment.pop(GRADIENTS, 0)
        if gathered is not None:
            around = gathered.gradients if name in (TOP, REST) else 0
            layers = -(-layers // processes)
        if setting.accumulates:  # an earlier pass has made them
            layers, moment[TERNARY] = lasting.gradients, lasting.ternary
        moments[name] = moment | {GRADIENTS: around + layers}
    moments[UPDATE] = kept | {"optimizer update": optimizer.temporary}
    if gathered is not None:
        copies = {FORWARD: IN_FORWARD, LOSSES: IN_LOSSES, TOP: IN_BACKWARD, REST: IN_BACKWARD}
        for name, count in copies.items():
            if name in moments:
                moments[name][GATHERED] = gathered.around + count * gathered.layer
        moments[EXCHANGE] = kept | {GATHERED: gathered.around + 2 * gathered.gradients}
    filled = {name: always | each for name, each in moments.items()}
    parts = [part for each in filled.values() for part, size in each.items() if size]
    return MemoryPlan(
        moments={name: {part: each.get(part, 0) for part in parts} for name, each in filled.items()},
        paged=optimizer.paged,
    )
