"""Capturing twins of vLLM's decoder models: same weights and forward, but the step ends in features.

A twin is a *pooling* model: vLLM hands the hidden states of every scheduled position to its pooler, and
`CapturePooler` reduces them in the worker to one byte row per position. See docs/architecture.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.sequence import IntermediateTensors

from pipeline.capture.plugin import PREFIX
from pipeline.capture.pooler import CapturePooler
from pipeline.capture.spec import CONFIG_KEY, CaptureSpec


def capture_spec(vllm_config: VllmConfig) -> CaptureSpec:
    return CaptureSpec.from_json(vllm_config.additional_config[CONFIG_KEY])


def has_aux_interface(model_class: type[nn.Module]) -> bool:
    """Whether the class can return chosen residual streams itself, also under torch.compile."""
    return bool(getattr(model_class, "supports_eagle3", False))


class ResidualTap:
    """Records the residual stream before or after chosen decoder layers, by forward hooks (eager only)."""

    def __init__(self, layers: nn.ModuleList, indices: tuple[int, ...]) -> None:
        self.streams: dict[int, torch.Tensor] = {}
        for index in indices:
            if index == 0:
                layers[0].register_forward_pre_hook(self._embedding_hook(layers[0]), with_kwargs=True)
            else:
                layers[index - 1].register_forward_hook(self._block_hook(index))

    def _embedding_hook(self, layer: nn.Module) -> Callable[..., None]:
        signature = inspect.signature(layer.forward)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.streams[0] = signature.bind(*args, **kwargs).arguments["hidden_states"]

        return hook

    def _block_hook(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            # vLLM's layers return (delta, residual) where the next norm fuses the addition, else the stream.
            if isinstance(output, tuple):
                hidden, residual = output[0], output[1]
                self.streams[index] = hidden if residual is None else hidden + residual
            else:
                self.streams[index] = output

        return hook


def make_capture_class(base: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of vLLM's `base` whose pooler returns the features that the engine was started for."""
    aux = has_aux_interface(base)

    class Capture(base, VllmModelForPooling):  # type: ignore[valid-type, misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            spec = capture_spec(vllm_config)
            depth = vllm_config.model_config.get_total_num_hidden_layers()
            # The stream after the last block is taken behind the final norm, where transformers takes it too.
            self._inner = tuple(layer for layer in spec.layers if layer < depth)
            self._tap: ResidualTap | None = None
            if self._inner and aux:
                self.set_aux_hidden_state_layers(self._inner)
            elif self._inner:
                self._tap = ResidualTap(self.model.layers, self._inner)
            self.pooler = CapturePooler(self, spec, vllm_config)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | IntermediateTensors:
            out = super().forward(*args, **kwargs)
            if isinstance(out, IntermediateTensors):
                return out
            if isinstance(out, tuple):
                return torch.cat([out[0], *out[1]], dim=-1)
            if self._tap is not None:
                return torch.cat([out, *(self._tap.streams[layer] for layer in self._inner)], dim=-1)
            return out

    Capture.__name__ = Capture.__qualname__ = name
    return Capture


def __getattr__(name: str) -> type[nn.Module]:
    """Build `DistilyCapture_<Architecture>` from vLLM's own registry on first use."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    twin = make_capture_class(base, name)
    twin.__module__ = __name__
    globals()[name] = twin
    return twin
