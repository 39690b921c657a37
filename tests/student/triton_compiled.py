"""Compiles BitLinear's Triton kernels for GPUs on a machine without one: python -m
tests.student.triton_compiled.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime import driver

from student.bitnet import chains, chains_triton
from tests.pipeline.triton_compiled import NoGpu


def main() -> None:
    """Every kernel, as a launch would have it compiled."""
    driver.set_active(NoGpu(80))
    names = set()

    def compiled(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        asm = kernel.warmup(*arguments, **constants, enable_fp_fusion=False, grid=grid).asm
        assert asm["cubin"] and ".target sm_80" in asm["ptx"]
        # Neither approximate divisions nor fused products, whose bits would be others.
        assert not any(word in asm["ptx"] for word in ("div.full", "div.approx", "rcp.approx", "fma.rn.f32"))
        names.add(kernel.__name__)

    with patch.object(chains_triton, "launch", compiled):
        chains._sample(chains_triton.KERNELS, torch.device("cpu"), torch.bfloat16)
    sys.stdout.write("\n".join(sorted(names)))


if __name__ == "__main__":
    main()
