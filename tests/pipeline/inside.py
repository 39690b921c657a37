"""For programs that hold several vLLM engines, one after another, within their own process."""

from __future__ import annotations

import gc
import os


def prepare() -> None:
    """Before the first engine.

    vLLM collects garbage six times for each engine, and unfreezes before what it froze: a second each time
    for the millions of objects of loaded modules, which stay.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def clean_up() -> None:
    """After each engine: what it leaves behind, which a process of its own takes along.

    vLLM puts its CPU kernels in place of those of Triton by a search of all modules, a second for each
    engine; after the first they are in place.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    cleanup_dist_env_and_memory()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda _: None)
