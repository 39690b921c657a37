"""A few layers of a student as a module of their own, and how far they are from the teacher's.

Shape letters: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from student.bitnet import convert, normed, quantize_once
from student.blockwise.plan import Block
from student.errors import UserError
from student.losses.hidden import nmse
from student.modeling.copying import copy_from_teacher, layer_prefix
from student.modeling.plan import StudentPlan
from student.modeling.saving import new_student
from student.modeling.shape import changed_config


class BlockModule(nn.Module):
    """The layers of a block, copied from the teacher and in full precision, until they are converted.

    They run inside the student's own decoder class, of as many layers: masks, rotations and what else an
    architecture does around its layers are its own. What goes into the first layer is replaced by the given
    states, so that embeddings, and what is added to them or multiplied with them, count in the first block
    only.

    Args:
        plan: of the whole student.
        block: which layers.

    Raises:
        UserError: the teacher's files lack a tensor.
    """

    def __init__(self, plan: StudentPlan, block: Block) -> None:
        super().__init__()
        self.block = block
        model = new_student(_config(plan.config, block))
        assert plan.teacher is not None
        copied = [plan.layers[layer] for layer in block.layers]
        copy_from_teacher(model, copied, plan.teacher, plan.narrowing, _ends(model) if block.number else ())
        self.decoder: Any = model.get_decoder()
        self._inside = next(
            f"{name}." if name else "" for name, one in model.named_modules() if one is self.decoder
        )
        self._prefix = layer_prefix(model)
        self.requires_grad_(False)
        self.layers.requires_grad_(True)
        if block.last:  # the final norm
            for module in self.decoder.modules():
                if not isinstance(module, nn.Embedding):
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(True)

    @property
    def layers(self) -> nn.ModuleList:
        """Of the block."""
        layers: nn.ModuleList = self.decoder.layers
        return layers

    def forward(self, given: Tensor) -> Tensor:
        """Token ids int64 [B, T] of the first block, states [B, T, D] of the others -> states [B, T, D]."""
        behind: list[Tensor] = []
        hooks = [
            self.layers[-1].register_forward_hook(lambda _module, _args, out: behind.append(_states(out)))
        ]
        if self.block.number:
            hooks.append(self.layers[0].register_forward_pre_hook(_replacing(given), with_kwargs=True))
        try:
            inputs = {"inputs_embeds" if self.block.number else "input_ids": given}
            body = self.decoder(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        last: Tensor = body.last_hidden_state
        return last if self.block.last else behind[0]

    @torch.no_grad()
    def restore(self, conversion: str, eps: float, weights: Mapping[str, Tensor]) -> None:
        """Convert the layers and take what was trained, for inference; weights: as `trained` names them."""
        convert(self.layers, normed(self.layers, conversion), eps)
        for name, parameter in self.trained():
            parameter.copy_(weights[name])
        self.eval()
        quantize_once(self)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by its name in the whole student."""
        for name, parameter in self.decoder.named_parameters():
            if not parameter.requires_grad:
                continue
            full = self._inside + name
            if full.startswith(self._prefix):
                index, rest = full[len(self._prefix) :].split(".", 1)
                full = f"{self._prefix}{self.block.layers[int(index)]}.{rest}"
            yield full, parameter


def relative_errors(states_BTD: Tensor, target_BTD: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, weight) over the positions of a batch, of squared differences relative to the teacher's squares;
    weight_BT: 0 where nothing is compared.
    """
    counts_N = weight_BT.flatten().nonzero().squeeze(1)
    states_ND, target_ND = (x.flatten(0, 1).index_select(0, counts_N) for x in (states_BTD, target_BTD))
    weight_N = weight_BT.flatten().index_select(0, counts_N)
    return (nmse(states_ND, target_ND) * weight_N).sum(), weight_N.sum()


def check_blocks(config: Any) -> None:
    """UserError for an architecture whose layers cannot be found; nothing is built."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UserError(
            f"--init blockwise: the layers of a {config.model_type} student are not known; use --init teacher"
        )


def _config(config: Any, block: Block) -> Any:
    """That of the block's layers; only the first block has embeddings."""
    changes = {"num_hidden_layers": len(block.layers)}
    made, _ = changed_config(config, changes, ",".join(map(str, block.layers)))
    if block.number:
        made.vocab_size, made.pad_token_id = 1, None
    return made


def _ends(model: Any) -> set[str]:
    """Names of the parameters of embeddings and head."""
    ends = {
        id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in ends}


def _replacing(states: Tensor) -> Any:
    """A hook that has a layer read these states."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    return hook


def _states(output: Any) -> Tensor:
    """Of a decoder layer's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
