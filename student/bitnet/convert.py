"""From linear layers to BitLinear ones, and the three places where a norm may stand before them.

none: nowhere, the model keeps its architecture. subln: before the projections whose input is not normalised
already, the attention's output and the MLP's last one (SubLN of BitNet b1.58 2B4T, arXiv:2504.12285, and
BitDistill, arXiv:2510.13998). per-projection: before every projection, as in BitNet (arXiv:2310.11453).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from student.bitnet.linear import BitLinear, RMSNorm, bit_linears
from student.errors import UserError

CONVERSIONS = ("none", "subln", "per-projection")

# Names of the projections that subln means, in the architectures of transformers.
_ATTENTION_OUTPUTS = ("o_proj", "dense", "out_proj")
_MLP_OUTPUTS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers, not converted ones."""
    return (
        (name, linear)
        for name, linear in module.named_modules()
        if type(linear) is nn.Linear  # no subclass: it computes something else
    )


def normed(layers: nn.ModuleList, conversion: str) -> set[str]:
    """Names, under `layers`, of the linear layers that get a norm; UserError where subln does not find its
    two in a decoder layer.
    """
    names = [name for name, _ in _linears(layers)]
    if conversion == "none":
        return set()
    if conversion == "per-projection":
        return set(names)
    chosen = set()
    for index in range(len(layers)):
        own = [name for name in names if name.startswith(f"{index}.")]
        for what, known in (("attention's output", _ATTENTION_OUTPUTS), ("MLP's last", _MLP_OUTPUTS)):
            found = [name for name in own if name.rpartition(".")[2] in known]
            if len(found) != 1:
                raise UserError(
                    f"--bitnet-conversion subln: layer {index} has {len(found)} linear layers called "
                    f"{' or '.join(known)}, so its {what} projection is not known; use per-projection or none"
                )
            chosen |= set(found)
    return chosen


def convert(layers: nn.Module, norms: set[str] | frozenset[str] = frozenset(), eps: float = 1e-6) -> int:
    """Turn every nn.Linear under `layers` into a BitLinear that owns the same parameters; returns
    how many.

    norms: names under `layers` that get an RMSNorm with a weight of ones.
    """
    linears = list(_linears(layers))
    for name, linear in linears:
        with torch.device("meta"):
            bit = BitLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        bit.weight, bit.bias = linear.weight, linear.bias
        if name in norms:
            bit.rms_norm = RMSNorm(linear.in_features, eps).to(linear.weight.device)
        bit.train(linear.training)
        layers.set_submodule(name, bit)
    return len(linears)


def convert_student(student: Any, conversion: str) -> None:
    """Convert the decoder layers of a causal language model; the weights of added norms are ones."""
    layers = student.get_decoder().layers
    convert(layers, normed(layers, conversion), norm_epsilon(student.config))


def norm_epsilon(config: Any) -> float:
    """Of the norms that conversion adds: that of the model's own."""
    return float(getattr(config.get_text_config(), "rms_norm_eps", 1e-6))


def conversion_of(model: nn.Module) -> str | None:
    """The conversion that a model went through; None for one in full precision."""
    norms = [layer.rms_norm is not None for _, layer in bit_linears(model)]
    if not norms:
        return None
    return "per-projection" if all(norms) else "subln" if any(norms) else "none"


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The entry of config.json with which transformers loads the latent weights into its online
    AutoBitLinear.
    """
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    entry: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": kept,
    }
    if conversion_of(model) == "per-projection":
        norm = next(layer.rms_norm for _, layer in bit_linears(model))
        assert norm is not None
        entry |= {"use_rms_norm": True, "rms_norm_eps": norm.eps}
    return entry
