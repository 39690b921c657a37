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
from student.planning.standin import GRADIENTS, Trace
from student.planning.tracking import Moment

FEW = (2, 3)  # layers of the stand-ins
UPDATE = "optimizer"
_SAMPLE = 4096  # weights per layer whose movement is watched, see student.bitnet.meter


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a training can be changed to make it fit.

    rows: samples of a process in one pass; accumulated: passes of an optimizer step; optimizer: of
    `student.planning.optimizers`.
    """

    rows: int
    accumulated: int
    checkpointing: bool
    optimizer: str

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of earlier passes are there before a pass."""
        return self.accumulated > 1


@dataclass(frozen=True, kw_only=True)
class Lasting:
    """Bytes that are there all the time, and of all gradients.

    process: of the process beside its tensors: libraries, or the context of a GPU.
    """

    weights: int
    gradients: int
    ternary: int
    teacher: int
    batch: int
    process: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, as far as a part takes any.

    whole: the most of each part at any time. peak: of all parts at the fullest moment. paged: of the
    optimizer's state in host memory, not in `peak`.
    """

    whole: Mapping[str, int]
    at_peak: Mapping[str, int]
    moment: str
    paged: int

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
    """Of a BitNet student's copies: the ternary weights in int8 with their scale, as they are multiplied and
    as they were at the last log with the first scale, and the sample of each layer.
    """
    total = 0
    for one in parameters:
        if one.ternary:
            stride = max(1, one.count // _SAMPLE)
            total += 2 * (one.count + 4) + -(-one.count // stride) * one.item
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
    lasting: Lasting, optimizer: OptimizerMemory, trace: Trace, setting: Setting, processes: int
) -> MemoryPlan:
    """The fullest moment of a step, once the optimizer has its state.

    Several processes exchange gradients in buckets, which are a copy of them (DistributedDataParallel).
    """
    always = {
        "weights": lasting.weights,
        "optimizer state": optimizer.state,
        "ternary copies": lasting.ternary,
        "teacher's weights": lasting.teacher,
        "batch": lasting.batch,
        "gradient buckets": lasting.gradients if processes > 1 else 0,
        "process": lasting.process,
    }
    moments = {name: dict(moment.bytes) for name, moment in trace.moments.items()}
    if setting.holds_gradients:
        moments = {name: each | {GRADIENTS: lasting.gradients} for name, each in moments.items()}
    moments[UPDATE] = {GRADIENTS: lasting.gradients, "optimizer update": optimizer.temporary}
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    passing = {label for each in moments.values() for label in each}
    whole = always | {label: max(each.get(label, 0) for each in moments.values()) for label in passing}
    at_peak = always | {label: moments[fullest].get(label, 0) for label in passing}
    return MemoryPlan(
        whole={name: size for name, size in whole.items() if size},
        at_peak={name: at_peak[name] for name, size in whole.items() if size},
        moment=fullest,
        paged=optimizer.paged,
    )
