"""One vLLM `LLM` under watch: started the same way for capturing and for writing, and ended for good."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from distily.system.machine import separate_compiled_code
from pipeline.capture.watch import announced_driver
from pipeline.engines.base import EngineConfig
from pipeline.engines.feed import Feed
from pipeline.engines.links import without_unused_weights
from pipeline.engines.supervision import EngineProcesses

T = TypeVar("T")

# Seconds: eleven days; in milliseconds it still fits 32 bits.
_NEVER = str(10**6)
_SHUTDOWN_SECONDS = 1.5
_SEPARATE_CORE = "VLLM_ENABLE_V1_MULTIPROCESSING"
# Sequences of one step; vLLM's own default.
SEQUENCES = 256
_CPU_DEFAULTS = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # Threads that spin while they wait take the time of those they wait for, where other programs run too.
    "OMP_WAIT_POLICY": "passive",
    # glibc gives freed tensors of some MiB back to the system and takes fresh pages for the next ones, which
    # may cost several times the arithmetic on them: the worker keeps them. Every glibc takes up to 2**25.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}


def set_environment(verbose: bool) -> None:
    """What vLLM reads from the environment at import, and its processes; what the user has set stays."""
    separate_compiled_code()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A step that still computes is not late, whatever the machine; processes that died are noticed as such.
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", _NEVER)
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", _NEVER)
    # A request asks torch for a GPU before vLLM is loaded, and a process that is forked from one that has
    # asked cannot use it. vLLM forks by default; on a CPU it spawns anyway.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Import-time noise of the engine's processes: deprecations, and that a CPU has no Triton.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
        os.environ.setdefault("TORCH_LOGS", "-torch._library")
        # The same here, where torch has read its environment already.
        logging.getLogger("torch._library").setLevel(logging.ERROR)
        # Warns of a Triton without a CPU backend, which pip installs with vLLM's CPU build, before vLLM gives
        # its loggers their level.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def own_step_tokens(tensor_parallel_size: int) -> int:
    """Positions of one step by vLLM's own choice for this machine: 16,384 on an H100, 8,192 on small GPUs."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    return int(EngineArgs.get_batch_defaults(tensor_parallel_size)[0][UsageContext.LLM_CLASS])


class SupervisedLLM:
    """A vLLM `LLM` of a checkpoint, and its processes; `options` are vLLM's own.

    kv_cache_memory_bytes: room for keys and values; None leaves it to vLLM, on a GPU.

    Raises:
        EngineError: vLLM did not start, or its processes died during a call; the message says why.
    """

    @announced_driver()
    def __init__(
        self,
        config: EngineConfig,
        verbose: bool,
        *,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        **options: Any,
    ) -> None:
        set_environment(verbose)
        self._llm: Any = None
        self._feed: Feed | None = None
        self._links = without_unused_weights(config.model)
        if self._links is not None:
            config = replace(config, model=Path(self._links.name))
        self._separate = os.environ.get(_SEPARATE_CORE) != "0"
        self._processes = EngineProcesses(verbose, separate=self._separate)
        try:
            start = partial(_start, config, verbose, enforce_eager, kv_cache_memory_bytes, options)
            self._llm = self._processes.start(start)
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[Any], T]) -> T:
        """`function` of the `LLM`."""
        return self._processes.call(partial(function, self._llm))

    def feed(self, params: Any, window: int) -> Feed:
        """What takes prompts, `window` positions at a time; this `LLM` runs nothing else from now on."""
        wait = self._processes.wait if self._separate else None
        self._feed = Feed(self._llm.llm_engine, params, window, wait)
        return self._feed

    def close(self) -> None:
        """End the processes, and with them the memory that they hold."""
        if self._feed is not None:
            self._feed.close()
        core = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if core is not None:
            # vLLM waits for a step in progress; whoever closes an engine has no use for it any more. Within
            # our own process there is none, and nothing that could be ended for good.
            ending = Thread(target=core.shutdown, daemon=True, name="vllm-shutdown")
            ending.start()
            ending.join(_SHUTDOWN_SECONDS if self._separate else None)
        self._llm = None
        self._processes.end()
        if self._links is not None:
            self._links.cleanup()


def _start(
    config: EngineConfig,
    verbose: bool,
    enforce_eager: bool,
    kv_cache_memory_bytes: int | None,
    options: dict[str, Any],
) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        for name, value in _CPU_DEFAULTS.items():
            os.environ.setdefault(name, value)
    memory = _memory(config, kv_cache_memory_bytes, on_cpu)
    step = config.max_num_batched_tokens or own_step_tokens(config.tensor_parallel_size)
    with _core_placed(on_cpu) as placement:
        return LLM(
            model=str(config.model),
            load_format="safetensors",
            use_tqdm_on_load=verbose,
            dtype=config.dtype,
            quantization=config.quantize_to,
            max_model_len=config.max_seq_len,
            max_num_batched_tokens=step,
            # vLLM wants room for a position of each sequence in a step.
            max_num_seqs=min(SEQUENCES, step),
            enable_chunked_prefill=True,
            tensor_parallel_size=config.tensor_parallel_size,
            trust_remote_code=config.trust_remote_code,
            # Of a class that also sees or hears only the part that reads text is run; the rest is not loaded.
            language_model_only=True,
            # On the CPU compiling costs more than it saves.
            enforce_eager=on_cpu or enforce_eager,
            disable_log_stats=True,
            seed=config.seed,
            **memory,
            **placement,
            **options,
        )


@contextmanager
def _core_placed(on_cpu: bool) -> Iterator[dict[str, Any]]:
    """vLLM's options that put its scheduler into our process on a CPU, and the worker into one of its own.

    vLLM's choice there is a process for each, and importing it takes each of them 20 seconds of a core. On a
    GPU scheduling in a process of its own overlaps with the steps, so vLLM's choice stays, as does the
    user's.
    """
    if not on_cpu or _SEPARATE_CORE in os.environ:
        yield {}
        return
    os.environ[_SEPARATE_CORE] = "0"
    try:
        yield {"distributed_executor_backend": "mp"}
    finally:
        del os.environ[_SEPARATE_CORE]


def _memory(config: EngineConfig, kv_cache_memory_bytes: int | None, on_cpu: bool) -> dict[str, Any]:
    """vLLM's options for the memory of its KV cache; VLLM_CPU_KVCACHE_SPACE goes before them on a CPU."""
    if config.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    if kv_cache_memory_bytes is None and on_cpu:
        # The default would be nearly all of the machine's memory.
        kv_cache_memory_bytes = 2**30
    return {"kv_cache_memory_bytes": kv_cache_memory_bytes}
