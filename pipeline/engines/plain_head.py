"""Whether a class of transformers gives logits that can be computed from its last hidden states alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# Hidden states of the probe, and rows of its head.
_POSITIONS, _ROWS = 3, 5


def has_plain_head(model_class: Any, config: Any) -> bool:
    """Whether logits are softcap(logit_scale * head(hidden states)), by what the class itself computes.

    The decoder is replaced by random hidden states and the head by a small random one, so that the class runs
    what it has around them and no weight of the model takes memory. logit_scale and final_logit_softcapping
    are settings of the configuration; many have neither.
    """
    text = config.get_text_config()
    hidden = torch.randn(1, _POSITIONS, text.hidden_size, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(text.hidden_size, _ROWS, bias=False)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config)).eval()
        setattr(model, model.base_model_prefix, _Hidden(hidden))
        model.set_output_embeddings(head)
        with torch.inference_mode():
            found = model(input_ids=torch.zeros(1, _POSITIONS, dtype=torch.long), use_cache=False).logits
            expected = head(hidden) * getattr(text, "logit_scale", 1.0)
            cap = getattr(text, "final_logit_softcapping", None)
            expected = expected if cap is None else cap * torch.tanh(expected / cap)
    except Exception:  # a class that does more than this around its decoder may fail in any way
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


class _Hidden(nn.Module):
    """A decoder whose output is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _Output(self._hidden)


class _Output(SimpleNamespace):
    """What decoders return, by name and by place; None for all but the last hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, _index: int) -> Any:
        return self.last_hidden_state
