"""The NVIDIA GPUs of this machine as its driver lists them, whether or not a tensor library can use them.

A build of torch for CUDA 13 sees no GPU behind a driver that is too old for it, and would compute on the CPU
without a word. Nothing here imports a tensor library.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# The first driver that runs CUDA 13, which torch's and vLLM's current wheels are built for.
CUDA_13_DRIVER = 580
_PROC = Path("/proc/driver/nvidia")
_SECONDS = 20


def hidden_gpus(uses_cpu: str) -> str:
    """What to tell a user whose machine has NVIDIA GPUs, where torch has been found to see none; "" where
    there are none, or CUDA_VISIBLE_DEVICES hides them.

    uses_cpu: how the user asks for the CPU, in words.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return ""
    gpus = listed_gpus()
    if not gpus:
        return ""
    driver = driver_version()
    old = driver is not None and driver[0] < CUDA_13_DRIVER
    found = f" (driver {'.'.join(map(str, driver))})" if driver else ""
    fix = f"update the driver to {CUDA_13_DRIVER} or newer" if old else "check the driver"
    return (
        f"this machine has {gpus[0]}{found}, but torch sees no GPU: {fix}, install the build of torch that "
        f"fits it (for older drivers that of CUDA 12), or ask for the CPU with {uses_cpu}"
    )


def listed_gpus() -> list[str]:
    """Names, from `nvidia-smi -L`, else from the driver's own files."""
    lines = _nvidia_smi("-L")
    names = [line.split(":", 1)[1].split("(UUID")[0].strip() for line in lines if line.startswith("GPU ")]
    if names:
        return names
    try:
        return ["an NVIDIA GPU" for _ in (_PROC / "gpus").iterdir()]
    except OSError:
        return []


def driver_version() -> tuple[int, ...] | None:
    """E.g. (550, 90, 7); None where it is not known."""
    for line in _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"):
        parts = line.strip().split(".")
        if all(part.isdecimal() for part in parts):
            return tuple(map(int, parts))
    return None


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
