"""vLLM's wrapper around transformers' classes, watched: it runs attention itself and passes over what it does
not know, such as a mask that a class computes from its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.capture.complaint import complain
from pipeline.errors import EngineError

# vLLM's names for its attention among those of transformers.
_NAMES = ("vllm", "vllm_mla")
# Arguments that vLLM heeds in its own way, or that change nothing of a forward pass over a prompt.
_HEEDED = frozenset(
    [
        "dropout",
        "s_aux",
        "position_ids",
        "cache_position",
        "use_cache",
        "past_key_values",
        "past_key_value",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "is_causal",
    ]
)


def watch_attention() -> None:
    """Complain when a model asks attention for what vLLM's does not do; in an engine's process, before it
    runs.
    """
    for name in _NAMES:
        attention = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(attention, _Watched):
            ALL_ATTENTION_FUNCTIONS.register(name, _Watched(attention))


def unheeded(layer: Any, attention_mask: Any, wanted: dict[str, Any]) -> str | None:
    """What a model wants of attention and does not get; None if it gets all.

    layer: vLLM's, of which `sliding_window` and `impl.scale`, `impl.logits_soft_cap` are read where it has
    them. attention_mask and wanted: what transformers' class passes on.
    """
    if attention_mask is not None:
        return "it has an attention mask of its own"
    if wanted.get("is_causal") is False:
        return "its attention is not causal"
    impl = getattr(layer, "impl", None)
    served = {
        "scaling": getattr(impl, "scale", None),
        "softcap": getattr(impl, "logits_soft_cap", None),
        "sliding_window": getattr(layer, "sliding_window", None),
    }
    for name, given in served.items():
        asked = wanted.get(name)
        # Where it asks for nothing, and vLLM does something, the class has another way of saying it.
        if asked is not None and not math.isclose(float(asked), float(given or 0.0), rel_tol=1e-5):
            return f"its {name} is {asked}, vLLM's {given}"
    other = [
        name
        for name, value in wanted.items()
        if value is not None and name not in _HEEDED and name not in served
    ]
    return f"its attention takes {', '.join(sorted(other))}" if other else None


class _Watched:
    """One of vLLM's attention functions, whose callers are looked at in their first pass."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        self._attention = attention
        self._seen: set[int] = set()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(module) not in self._seen:
            self._seen.add(id(module))
            mask = kwargs.get("attention_mask", args[3] if len(args) > 3 else None)
            wanted = {name: value for name, value in kwargs.items() if name != "attention_mask"}
            if reason := unheeded(getattr(module, "attn", None), mask, wanted):
                line = f"--engine vllm: not in vLLM's wrapper of {type(module).__name__}, {reason}"
                complain(EngineError(f"{line}; use --engine transformers"))
        return self._attention(module, *args, **kwargs)
