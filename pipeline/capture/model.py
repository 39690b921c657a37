"""Capturing twins of vLLM's decoder models: same weights and forward, but the step ends in features.

A twin is a *pooling* model: vLLM hands the hidden states of every scheduled position to its pooler, and
`CapturePooler` reduces them in the worker to one byte row per position. See docs/architecture.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.sequence import IntermediateTensors

from pipeline.capture.complaint import complain
from pipeline.capture.plugin import PREFIX, WRAPPERS, original
from pipeline.capture.pooler import CapturePooler
from pipeline.capture.spec import CONFIG_KEY, CaptureSpec
from pipeline.capture.tap import ResidualTap
from pipeline.capture.wrapped import watch_attention
from pipeline.errors import EngineError


def capture_spec(vllm_config: VllmConfig) -> CaptureSpec:
    return CaptureSpec.from_json(vllm_config.additional_config[CONFIG_KEY])


def make_capture_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of vLLM's `base` whose pooler returns the features that the engine was started for."""

    class Capture(base, VllmModelForPooling):  # type: ignore[valid-type, misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            spec = capture_spec(vllm_config)
            model_config = vllm_config.model_config
            depth = model_config.get_total_num_hidden_layers()
            # The stream after the last block is taken behind the final norm, where transformers takes it too.
            inner = tuple(layer for layer in spec.layers if layer < depth)
            self._tap: ResidualTap | None = None
            if inner:
                self._tap = ResidualTap(self, depth, model_config.get_hidden_size(), inner)
            self.pooler = CapturePooler(self, spec, vllm_config)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | IntermediateTensors:
            out = super().forward(*args, **kwargs)
            if self._tap is None:
                return out
            try:
                streams = self._tap.streams(len(out))
            except EngineError as error:
                complain(error)
                streams = [torch.zeros_like(out)] * len(self._tap.indices)
            return torch.cat([out, *streams], dim=-1)

    # vLLM asks some classes for their name, e.g. whether a model runs in its Transformers backend.
    Capture.__name__ = Capture.__qualname__ = base.__name__
    return Capture


def __getattr__(name: str) -> type[nn.Module]:
    """Build `DistilyCapture_<Architecture>` from vLLM's own registry on first use."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    base = original(name.removeprefix(PREFIX)).load_model_cls()
    if base.__name__ in WRAPPERS:
        watch_attention()
    twin = make_capture_class(base)
    twin.__module__ = __name__
    globals()[name] = twin
    return twin
