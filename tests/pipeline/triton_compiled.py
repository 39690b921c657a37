"""Compiles the Triton kernel for GPUs on a machine without one: python -m tests.pipeline.triton_compiled."""

from __future__ import annotations

import math
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from pipeline.capture.reduce import BLOCK, FARTHEST
from pipeline.capture.reduce_triton import LANES, WARPS, scan_kernel


class NoGpu(DriverBase):
    """Names the GPU to compile for, and can run nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        return None


def main() -> None:
    for capability, name, dtype in ((80, "f32", torch.float32), (90, "bf16", torch.bfloat16)):
        driver.set_active(NoGpu(capability))
        scan_kernel.device_caches.clear()
        kernel = scan_kernel.warmup(
            dtype,
            torch.int64,
            *[torch.float32] * 6,
            49_152,
            49_152,
            49_152 // BLOCK,
            RATES=tuple(math.log2(math.e) / temperature for temperature in (4.0, 2.0, 1.0, 0.3)),
            SQUARINGS=(0, 1, 0, 0),
            UNIT=2,
            LANES=LANES,
            BLOCK=BLOCK,
            FARTHEST=FARTHEST,
            num_warps=WARPS,
            grid=(1,),
        )
        assert kernel.asm["cubin"] and f".target sm_{capability}" in kernel.asm["ptx"]
        # 16 bytes at once, as many as each thread has of a tile; the label is the load beside them.
        loads = re.findall(r"\bld\.global\S*", kernel.asm["ptx"])
        own = LANES * BLOCK * dtype.itemsize // (32 * WARPS * 16)
        assert loads.count("ld.global.v4.b32") == own and len(loads) == own + 1, loads
        sys.stdout.write(f"sm_{capability} {name}\n")


if __name__ == "__main__":
    main()
