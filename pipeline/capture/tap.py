"""The residual stream at chosen depths of any decoder vLLM has, by forward hooks (eager mode only).

Shapes: N scheduled positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import EngineError

# What the norm makes of the right stream differs from the model's output by rounding only (bf16: 2**-8).
_SAME = 0.02
Hook = Callable[..., None]


class ResidualTap:
    """Records the stream that enters layer 0 (index 0) or leaves layer i - 1 (index i).

    vLLM's layers return a tensor, the stream; or a pair, of which either the sum is the stream (the next norm
    adds the two in one kernel) or the first alone (the second is a left-over). Nothing in a model's interface
    tells the two apart, so its final norm does, in the first pass: given the right stream, it repeats the
    model's output.
    """

    def __init__(self, model: nn.Module, depth: int, hidden_size: int, indices: tuple[int, ...]) -> None:
        self._name = type(model).__name__
        self.indices = indices
        self._refusal: EngineError | None = None
        self._hidden_size = hidden_size
        self._adds: bool | None = None
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._watches: list[RemovableHandle] = []
        try:
            owner, layers = decoder_layers(text_model(model), depth)
        except EngineError as error:
            self._refusal = error
            return
        for index in indices:
            if index == 0:
                layers[0].register_forward_pre_hook(self._guarded(self._embedding_hook), with_kwargs=True)
            else:
                layers[index - 1].register_forward_hook(self._guarded(self._layer_hook(index)))
        self._watches += [layers[-1].register_forward_hook(self._guarded(self._watch_last))]
        others = (child for child in owner.children() if child is not layers)
        self._watches += [child.register_forward_hook(self._guarded(self._watch_norm)) for child in others]

    def streams(self, rows: int) -> list[torch.Tensor]:
        """The streams of the pass that has just ended, [rows, D] each, in the order of the indices.

        Raises:
            EngineError: they cannot be told from what this model's layers pass on.
        """
        if self._refusal is not None:
            raise self._refusal
        pairs, self._pairs = self._pairs, {}
        out = []
        for index in self.indices:
            first, second = pairs[index]
            if second is not None and self._adds is None:
                self._refuse("no norm after its layers tells which of their outputs is the residual stream")
            stream = first if second is None or not self._adds else first + second
            if stream.numel() != rows * self._hidden_size:
                self._refuse(f"its layers pass on {list(stream.shape)}, not one row per position")
            out.append(stream.reshape(rows, self._hidden_size))
        return out

    def _guarded(self, hook: Hook) -> Hook:
        """The hook, whose refusal is kept for `streams` instead of ending the model's forward."""

        def guarded(*args: Any) -> None:
            if self._refusal is None:
                try:
                    hook(*args)
                except EngineError as error:
                    self._refusal = error

        return guarded

    def _embedding_hook(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if _is_state(value) and value.shape[-1] == self._hidden_size:
                # A copy, here and below: fused norms add to a residual in place.
                self._pairs[0] = (value.clone(), None)
                return
        self._refuse("its first layer is given no embeddings")

    def _layer_hook(self, index: int) -> Hook:
        def hook(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if index in self._pairs:
                self._refuse("it runs its layers more than once per pass")
            first, second = self._parts(output)
            self._pairs[index] = (first.clone(), None if second is None else second.clone())

        return hook

    def _parts(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        values = output if isinstance(output, tuple) else (output,)
        if not _is_state(values[0]) or len(values) > 2:
            self._refuse(f"its layers return {len(values)} values")
        second = values[1] if len(values) == 2 else None
        if second is not None and not (_is_state(second) and second.shape == values[0].shape):
            self._refuse("its layers return a second value that is no residual")
        return values[0], second

    def _watch_last(self, _layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        first, second = self._parts(output)
        self._last = None if second is None else (first.clone(), second.clone())

    def _watch_norm(self, norm: Any, _args: tuple[Any, ...], output: Any) -> None:
        if self._last is None:
            return
        (first, second), self._last = self._last, None
        made = _first(output)
        alone, added = (_distance(_first(norm.forward(given)), made) for given in (first, first + second))
        if min(alone, added) > _SAME:
            self._refuse("its final norm repeats the model's output from none of its layers' outputs")
        # A pass over dummy data may leave both alike, or no numbers at all: then the next pass tells.
        self._adds = added <= alone
        if max(alone, added) > 2 * _SAME:
            for watch in self._watches:
                watch.remove()

    def _refuse(self, reason: str) -> None:
        raise EngineError(
            f"--hidden-layers: not from {self._name} in vLLM, {reason}; use --engine transformers"
        )


def text_model(model: nn.Module) -> nn.Module:
    """The part of a multimodal model that reads text, whose encoders may have as many layers; else itself."""
    language_model = getattr(model, "get_language_model", None)
    return language_model() if callable(language_model) else model


def decoder_layers(model: nn.Module, depth: int) -> tuple[nn.Module, nn.ModuleList]:
    """The outermost list of `depth` modules in the model, and the module that owns it.

    Raises:
        EngineError: there is none.
    """
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise EngineError(
            f"--hidden-layers: {type(model).__name__} in vLLM holds no list of its {depth} layers; "
            "use --engine transformers"
        )
    _, name, layers = min(found, key=lambda one: one[0])
    return model.get_submodule(name.rpartition(".")[0]), layers


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two tensors; 0 where they hold no numbers to compare."""
    gap = (one.float() - other.float()).norm() / other.float().norm()
    return float(gap) if gap.isfinite() else 0.0
