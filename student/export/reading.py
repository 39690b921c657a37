"""Models that others load from an export, as models that run on integers."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from student.export.packing import pack
from student.export.reference import IntegerLinear, integer_linears
from student.export.source import ExportSource
from student.modeling.whole import load_whole


def no_bars() -> AbstractContextManager[Any]:
    """While libraries load a model whose progress bars have no switch of their own."""
    return redirect_stderr(io.StringIO())


def matrices_to_integers(model: Any, source: ExportSource) -> Any:
    """A model whose ternary matrices come multiplied with their scale: both are taken back."""
    for name, layer in integer_linears(source.model):
        linear = model.get_submodule(name)
        weight_OI = linear.weight.detach()
        packed_RI = pack(weight_OI.sign().to(torch.int8))
        inverse = 1.0 / weight_OI.abs().max()
        model.set_submodule(
            name, IntegerLinear(packed_RI, inverse, layer.out_features, linear.bias, layer.rms_norm)
        )
    return model


def load_packed(directory: Path) -> Any:
    """An hf-bitnet export in float32, its matrices packed in memory as in the file."""
    from transformers.integrations.bitnet import BitLinear

    model = load_whole(directory, str(directory), dtype=torch.float32)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BitLinear):
            packed = IntegerLinear(
                layer.weight, layer.weight_scale, layer.out_features, layer.bias, layer.rms_norm
            )
            model.set_submodule(name, packed)
    return model
