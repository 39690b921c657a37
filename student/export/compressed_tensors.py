"""compressed-tensors W2A8: weights of 2 bits, a scale per row; activations of 8 bits, a scale per token.

vLLM runs this on GPUs by its humming kernels; transformers multiplies it out. Both take a token's largest
activation to 127.5 steps where BitNet has 127, a difference within the rounding of the activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from student.errors import UserError
from student.export.hf_bitnet import kept_linears, plain_state, write_config
from student.export.norms import norm_mode
from student.export.reading import matrices_to_integers, no_bars
from student.export.reference import integer_linears
from student.export.requirements import require_package
from student.export.source import ExportSource
from student.modeling.checkpoint import WEIGHTS

BITS = 2


def check(source: ExportSource) -> None:
    """UserError for what the format cannot hold, or where its package is missing."""
    if norm_mode(source) != "none":
        raise UserError(
            f"{source.directory}: compressed-tensors has no norms before projections; --format hf-bitnet has"
        )
    require_package("compressed-tensors", "compressed_tensors")


def write(source: ExportSource, out: Path, dtype: torch.dtype) -> None:
    """model.safetensors, config.json and the tokenizer; scales stay float32, the rest is `dtype`."""
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
    )

    state = plain_state(source, dtype)
    for name, layer in integer_linears(source.model):
        del state[f"{name}.weight"]
        scale_O1: Tensor = (1.0 / layer.weight_scale).expand(layer.out_features, 1)
        state[f"{name}.weight_packed"] = pack_to_int32(layer.ternary(), BITS).contiguous()
        state[f"{name}.weight_scale"] = scale_O1.contiguous()
        state[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    write_config(source, out, dtype, _quantization(source))


def _quantization(source: ExportSource) -> dict[str, Any]:
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": "pack-quantized"}},
        "ignore": kept_linears(source),
    }


def read(out: Path, source: ExportSource) -> Any:
    """The export as transformers multiplies it out, taken apart into integers again."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        ).eval()
    return matrices_to_integers(model, source)


def ternary_bytes(source: ExportSource) -> int:
    """Bytes of the packed matrices and of their scales, one a row."""
    return sum(rows * (-(-columns // 16) * 4 + 4) for rows, columns in source.shapes.values())
