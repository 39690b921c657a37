"""Where Triton looks for a backend's driver: the one class here."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from triton.backends import driver


class CpuDriver(driver.DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _nothing_is_compiled(self, *_: Any) -> NoReturn:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_current_target = get_benchmarker = _nothing_is_compiled
