"""A "cpu" backend of Triton that compiles nothing, so that vLLM's Model Runner V2 runs without a GPU.

vLLM's CPU build takes Triton for usable once a backend of that name is registered, as triton-cpu registers
one. With TRITON_INTERPRET Triton then runs each kernel as Python and asks no backend for code. It registers
what the entry points of installed packages name, which reaches every process of an engine.
"""

from __future__ import annotations

import os
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """The variables with which a process, and those that it starts, run Model Runner V2.

    folder: where the package of the entry point is made; it is on these processes' path only.
    """
    package = folder / "triton_cpu_backend-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-cpu-backend\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[triton.backends]\ncpu = {__name__}\n")
    path = [str(Path(__file__).parents[3]), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
