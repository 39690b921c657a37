"""BitBLAS (Wang et al. 2024): INT2 x INT8 matrix products on an NVIDIA GPU, for packed students.

BitBLAS lays weights out for the GPU it finds, so there is no file of its own: the export is an hf-bitnet
directory that was run by it. It needs CUDA 12's libraries already at import; therefore it is imported late.
Its kernels are compiled when a model is loaded, by nvcc, one for each shape of a layer. BitBLAS would also
try twenty of each to take the fastest, which takes minutes; its default schedule is taken instead.

Shape letters: N tokens, I input features, O output features.
"""

from __future__ import annotations

import importlib
import shutil
from functools import cache
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

_NEEDS = (
    "it needs an NVIDIA GPU, `pip install bitblas`, and the CUDA 12 toolkit: libnvrtc.so.12 and "
    "libcudart.so.12 on LD_LIBRARY_PATH and nvcc on PATH, which torch's builds for CUDA 13 do not bring; "
    "--format hf-bitnet and --kernel torch run without it"
)


def require() -> Any:
    """The package; UserError with what it misses, and all that it needs."""
    try:
        package = importlib.import_module("bitblas")
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing(one_line(error, None)) from error
    if not torch.cuda.is_available():
        raise _missing("torch finds no CUDA GPU")
    if shutil.which("nvcc") is None:
        raise _missing("there is no nvcc to compile its kernels")
    return package


def _missing(what: str) -> UserError:
    return UserError(f"BitBLAS cannot be used here: {what}; {_NEEDS}")


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


@cache
def operator(package: Any, inputs: int, outputs: int) -> Any:
    """The product of int8 [N, inputs] and int2 [outputs, inputs] in int32, for all layers of that shape; it
    holds no weights.
    """
    config = package.MatmulConfig(
        M=[1, 16, 32, 64],
        N=outputs,
        K=inputs,
        A_dtype="int8",
        W_dtype="int2",
        accum_dtype="int32",
        out_dtype="int32",
        layout="nt",
        with_bias=False,
    )
    return package.Matmul(config, enable_tuning=False)


class BitBlasLinear(IntegerLinear):
    """An IntegerLinear whose product is BitBLAS's; the weights are kept in its layout."""

    def __init__(self, layer: IntegerLinear, package: Any) -> None:
        super().__init__(layer.weight, layer.weight_scale, layer.out_features, layer.bias, layer.rms_norm)
        self._matmul = operator(package, layer.in_features, layer.out_features)
        self.register_buffer("weight", self._matmul.transform_weight(layer.ternary()))

    def product(self, ints_NI: Tensor) -> Tensor:
        """BitBLAS's own int32 sums, as float32 [N, O]."""
        sums_NO: Tensor = self._matmul(ints_NI, self.weight)
        return sums_NO.float()
