"""For programs that hold several vLLM engines, one after another, within their own process."""

from __future__ import annotations

import gc
import multiprocessing
import os
from functools import cache, partial


def prepare() -> None:
    """Before the first engine.

    vLLM collects garbage six times for each engine, and unfreezes before what it froze: a second each time
    for the millions of objects of loaded modules, which stay.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def fork_workers() -> None:
    """Have the processes of an engine with several ranks forked: importing vLLM takes each 20 seconds of a
    core, and here it is imported. Only before this program has computed anything.
    """
    import vllm.v1.executor.multiproc_executor as executor

    executor.get_mp_context = partial(multiprocessing.get_context, "fork")


def clean_up() -> None:
    """After each engine: what it leaves behind, which a process of its own takes along.

    vLLM puts its CPU kernels in place of those of Triton by a search of all modules, a second for each
    engine; from now on it does so once.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    cleanup_dist_env_and_memory()
    platform = type(current_platform)
    search = platform.register_triton_kernel_overrides.__func__
    if not hasattr(search, "cache_info"):
        platform.register_triton_kernel_overrides = classmethod(cache(search))
