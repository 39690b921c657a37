"""A device that a training is planned for. A step for it is followed on the CPU, so that code which asks what
its device can do has to ask here first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedDevice:
    """integers: whether it multiplies int8 values. free: bytes that chunks of the LM head may go by."""

    integers: bool
    free: int = 0


_device: ContextVar[PlannedDevice | None] = ContextVar("planned device", default=None)


def planned_device() -> PlannedDevice | None:
    """None where code runs for the device that it is on."""
    return _device.get()


@contextmanager
def planning_for(device: PlannedDevice) -> Iterator[None]:
    """What runs inside runs for another device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)
