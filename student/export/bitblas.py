"""BitBLAS (Wang et al. 2024): INT2 x INT8 matrix products on an NVIDIA GPU, for packed students.

BitBLAS lays weights out for the GPU it finds, so there is no file of its own: the export is an hf-bitnet
directory that was run by it. It needs CUDA 12's libraries already at import; therefore it is imported late.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distily.text import one_line
from student.errors import UserError
from student.export import hf_bitnet
from student.export.reading import load_packed
from student.export.reference import IntegerLinear, integer_linears
from student.export.source import ExportSource


def require() -> Any:
    """The package; UserError with the name of the library that it misses."""
    try:
        package = importlib.import_module("bitblas")
    except (ImportError, OSError, RuntimeError) as error:
        reason = one_line(error, None)
        raise UserError(
            f"BitBLAS cannot be used here: {reason}; it needs CUDA 12 (nvrtc, cudart, libcuda) and "
            "pip install bitblas; --format hf-bitnet runs without it"
        ) from error
    if not torch.cuda.is_available():
        raise UserError(
            "BitBLAS cannot be used here: torch finds no CUDA GPU; --format hf-bitnet runs without"
        )
    return package


def check(source: ExportSource) -> None:
    """UserError where BitBLAS does not run, and for shapes that cannot be packed."""
    require()
    hf_bitnet.check(source)


def read(out: Path, source: ExportSource) -> Any:
    """The packed export on the GPU, its products computed by BitBLAS."""
    del source
    return use_bitblas(load_packed(out))


def use_bitblas(model: Any) -> Any:
    """Move a model with integer layers to the GPU and let BitBLAS multiply there."""
    package = require()
    model.cuda()
    for name, layer in list(integer_linears(model)):
        model.set_submodule(name, BitBlasLinear(layer, package))
    return model


class BitBlasLinear(IntegerLinear):
    """An IntegerLinear whose product is BitBLAS's; the weights are kept in its layout."""

    def __init__(self, layer: IntegerLinear, package: Any) -> None:
        super().__init__(layer.weight, layer.weight_scale, layer.out_features, layer.bias, layer.rms_norm)
        config = package.MatmulConfig(
            M=[1, 16, 32, 64],
            N=layer.out_features,
            K=layer.in_features,
            A_dtype="int8",
            W_dtype="int2",
            accum_dtype="int32",
            out_dtype="int32",
            layout="nt",
            with_bias=False,
        )
        self._matmul = package.Matmul(config)
        self.register_buffer("weight", self._matmul.transform_weight(layer.ternary()))

    def product(self, ints_NI: Tensor) -> Tensor:
        """BitBLAS's own int32 sums, as float32 [N, O]."""
        sums_NO: Tensor = self._matmul(ints_NI, self.weight)
        return sums_NO.float()
