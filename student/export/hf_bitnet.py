"""Packed 1.58-bit safetensors for transformers' offline `BitLinear`.

`weight_scale` is the inverse of the matrix's scale: `bitlinear` divides by it, while transformers'
`autobitlinear` multiplies. A file with the other label loads without a word, so the export is read back.

SubLN students of Llama's shape become transformers' own `bitnet` architecture, which has both norms; norms on
every projection are `use_rms_norm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from student.bitnet import layout
from student.errors import UserError
from student.export.norms import norm_epsilons, norm_mode
from student.export.packing import PER_BYTE
from student.export.reference import integer_linears
from student.export.requirements import require_multiple
from student.export.source import ExportSource
from student.modeling.checkpoint import WEIGHTS


def check(source: ExportSource) -> None:
    """UserError for what transformers' packed layers cannot hold."""
    require_multiple(
        source,
        axis=0,
        multiple=PER_BYTE,
        what="a byte holds one column of four rows",
        fix="choose sizes that are multiples of 4 in --student-model-config",
    )
    mode, config = norm_mode(source), source.config
    if mode == "other" or len(norm_epsilons(source)) > 1:
        raise UserError(f"{source.directory}: transformers has no packed layers with norms placed like this")
    if mode == "subln" and not _llama_shaped(config, norm_epsilons(source)):
        raise UserError(
            f"{source.directory}: transformers has SubLN only in its own bitnet architecture, of Llama's "
            f"shape with one epsilon and heads as wide as the model; this student is {config['model_type']}; "
            "train it without SubLN for this format"
        )


def _llama_shaped(config: dict[str, Any], epsilons: set[float]) -> bool:
    return layout.to_saved(config, "subln")["model_type"] == "bitnet" and epsilons == {config["rms_norm_eps"]}


@torch.no_grad()
def fit(source: ExportSource, dtype: torch.dtype) -> None:
    """Round embeddings, head, norms and biases to `dtype`; scales of ternary matrices stay float32."""
    for parameter in source.model.parameters():
        parameter.copy_(parameter.to(dtype))
    for _, layer in integer_linears(source.model):
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.to(dtype))


def write(source: ExportSource, out: Path, dtype: torch.dtype) -> None:
    """model.safetensors, config.json and the tokenizer; ternary scales stay float32, the rest is `dtype`."""
    saved = layout.to_saved(source.config, norm_mode(source))
    state = plain_state(source, dtype)
    state = {layout.to_saved_name(name, saved): tensor for name, tensor in state.items()}
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    quantization: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": kept_linears(source),
    }
    if norm_mode(source) == "per-projection":
        quantization |= {"use_rms_norm": True, "rms_norm_eps": norm_epsilons(source).pop()}
    write_config(source, out, dtype, quantization, saved)


def plain_state(source: ExportSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors by name, tied ones once; packed weights and their scales as they are."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in source.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            keep = tensor.dtype == torch.uint8 or name.endswith(".weight_scale")
            state[name] = (tensor if keep else tensor.to(dtype)).contiguous()
    return state


def kept_linears(source: ExportSource) -> list[str]:
    """Names of the linear layers that are not ternary."""
    return [name for name, module in source.model.named_modules() if type(module) is nn.Linear]


def write_config(
    source: ExportSource,
    out: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any],
    saved: Mapping[str, Any] | None = None,
) -> None:
    """config.json with that `quantization_config`, and the tokenizer's files. saved: the settings where they
    are written as another architecture's.
    """
    config = {**(saved or source.config), "dtype": str(dtype).removeprefix("torch.")}
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    source.copy_tokenizer(out)


def read(out: Path, source: ExportSource) -> Any:
    """The export as transformers loads it, in float32."""
    del source
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def ternary_bytes(source: ExportSource) -> int:
    """Bytes that the packed matrices and their scales take."""
    return sum(layer.weight.numel() + 4 for _, layer in integer_linears(source.model))
