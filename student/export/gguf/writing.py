"""GGUF files for llama.cpp: ternary matrices in TQ2_0, TQ1_0, Q2_0 or Q4_0 blocks, everything else as asked.

The weights are ternarised before they are cut into blocks, and their scales are chosen so that float16 has
them: a block holds its part of the matrix exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student.errors import UserError
from student.export.gguf import architectures
from student.export.gguf.scales import fit_scales
from student.export.gguf.tokenizer import add_tokenizer
from student.export.gguf.types import TYPES, BlockType, to_blocks
from student.export.reference import integer_linears
from student.export.requirements import require_multiple, require_package
from student.export.source import ExportSource

_SMALLEST = 2.0**-14  # below, float16 has fewer than 11 bits
_GGML_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check(source: ExportSource, kind: BlockType) -> None:
    """UserError for what the file cannot hold or llama.cpp would not compute."""
    require_package("gguf", "gguf")
    architectures.architecture(source)
    smaller = [one for one in TYPES.values() if one.columns < kind.columns]
    others = [f"or --gguf-type {one.name}, whose blocks have {one.columns}" for one in smaller]
    fix = "choose hidden_size, intermediate_size and heads like that in --student-model-config"
    require_multiple(
        source,
        axis=1,
        multiple=kind.columns,
        what=f"{kind.name} has blocks of {kind.columns} columns",
        fix="; ".join([f"{fix} (with --init random where the teacher has other sizes)", *others]),
    )
    for name, layer in integer_linears(source.model):
        if not _SMALLEST <= 1.0 / float(layer.weight_scale) <= 65504:
            raise UserError(
                f"{source.directory}: the scale of {name}, {1.0 / float(layer.weight_scale):.2g}, does not "
                "fit the float16 of GGUF's blocks; --format hf-bitnet keeps scales in float32"
            )


@torch.no_grad()
def fit(source: ExportSource, dtype: torch.dtype) -> None:
    """Round embeddings and head to `dtype` and choose scales that float16 holds; norms and biases are float32
    in the file.
    """
    fit_scales(source.model)
    for parameter in source.model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.to(dtype))


def write(source: ExportSource, out: Path, dtype: torch.dtype, kind: BlockType) -> None:
    """One .gguf file with tokenizer and chat template."""
    import gguf

    name = architectures.architecture(source)
    gguf.GGML_QUANT_SIZES.setdefault(kind.number, (kind.columns, kind.block_bytes))  # Q2_0, where it is new
    writer = gguf.GGUFWriter(file_in(out, kind), name)
    writer.add_name(
        f"{source.config['model_type']} student"
    )  # alone, transformers takes "mistral" for an architecture
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architectures.add_settings(writer, source, name)
    add_tokenizer(writer, source.directory, source.config["vocab_size"])
    for theirs, values, number in _tensors(source, name, dtype, kind):
        writer.add_tensor(theirs, values, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_in(out: Path, kind: BlockType) -> Path:
    """Where the one file of an export lies."""
    return out / f"model-{kind.name}.gguf"


def _tensors(
    source: ExportSource, name: str, dtype: torch.dtype, kind: BlockType
) -> Iterator[tuple[str, np.ndarray[Any, Any], int]]:
    """(name in GGUF, values or bytes, number of the type) of every tensor."""
    import gguf

    layers = dict(integer_linears(source.model))
    for theirs, own, tensor in architectures.tensors(source, name):
        layer = layers.get(own.removesuffix(".weight"))
        if layer is not None:
            ternary = architectures.reorder(layer.ternary(), own, source.config, name)
            yield theirs, to_blocks(ternary.numpy(), 1.0 / float(layer.weight_scale), kind), kind.number
            continue
        number = gguf.GGMLQuantizationType[_GGML_NAMES[dtype if tensor.dim() > 1 else torch.float32]]
        values = architectures.reorder(tensor, own, source.config, name).float().numpy()
        yield theirs, gguf.quants.quantize(values, number), number
