"""Reading an exported GGUF file back, as a model that runs on integers.

transformers reads the files it knows, as full matrices from which the integers and the scale are taken back.
It reads neither Q2_0 blocks nor llama.cpp's bitnet architecture; for those the file is parsed here and its
bytes are decoded into the student's layers.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student.errors import StudentError
from student.export.gguf import architectures
from student.export.gguf.types import BlockType, Bytes, from_blocks
from student.export.packing import pack
from student.export.reading import matrices_to_integers, no_bars
from student.export.reference import integer_linears
from student.export.source import ExportSource

_READ_BY_TRANSFORMERS = ("TQ2_0", "TQ1_0", "Q4_0")
# Of these it takes the settings that it does not read from the file (the width of heads) from the student.
_CONFIG_NEEDED = ("qwen3",)
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def by_transformers(source: ExportSource, kind: BlockType) -> bool:
    """Whether transformers can read the file."""
    return kind.name in _READ_BY_TRANSFORMERS and architectures.architecture(source) != "bitnet"


def read(path: Path, source: ExportSource, kind: BlockType) -> Any:
    """The file as a model with integer layers, in float32."""
    if not by_transformers(source, kind):
        return _decode(path, source, kind)
    return matrices_to_integers(load(path, source), source)


def load(path: Path, source: ExportSource) -> Any:
    """The file as transformers loads it, in float32, with full matrices."""
    from transformers import AutoModelForCausalLM

    config = source.model.config if source.config["model_type"] in _CONFIG_NEEDED else None
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    return model.eval()


def _decode(path: Path, source: ExportSource, kind: BlockType) -> Any:
    name = architectures.architecture(source)
    stored, model = parse(path), copy.deepcopy(source.model)
    layers, state = dict(integer_linears(model)), model.state_dict()
    for theirs, own, _ in architectures.tensors(source, name):
        one = stored[theirs]
        layer = layers.get(own.removesuffix(".weight"))
        if layer is None:
            values = architectures.restore(torch.from_numpy(one.values()), own, source.config, name)
            state[own].copy_(values)
            continue
        ternary, scales = from_blocks(one.blocks(kind), kind)
        if (scales != scales[0]).any():
            raise StudentError(f"{path}: the blocks of {theirs} have different scales")
        restored = architectures.restore(torch.from_numpy(ternary), own, source.config, name)
        layer.weight.copy_(pack(restored))
        layer.weight_scale.fill_(1.0 / float(scales[0]))
    return model


@dataclass(frozen=True)
class GgufTensor:
    """shape: rows first. number: of the type in GGUF."""

    shape: tuple[int, ...]
    number: int
    data: Bytes

    def values(self) -> np.ndarray[Any, Any]:
        """Float32 [shape] of a tensor in F32, F16 or BF16."""
        import gguf

        kind = gguf.GGMLQuantizationType(self.number)
        width = {"F32": 4, "F16": 2, "BF16": 2}[kind.name]
        rows = self.data[: int(np.prod(self.shape)) * width].reshape(-1, self.shape[-1] * width)
        return np.array(gguf.quants.dequantize(rows, kind).reshape(self.shape), np.float32)

    def blocks(self, kind: BlockType) -> Bytes:
        """Uint8 [rows, bytes of a row] of a ternary tensor."""
        rows, columns = self.shape
        if self.number != kind.number:
            raise StudentError(f"a ternary matrix was written as type {self.number}, not {kind.name}")
        width = columns // kind.columns * kind.block_bytes
        return self.data[: rows * width].reshape(rows, width)


def parse(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file (version 3, little endian) by name; the data are mapped, not read."""
    whole = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(whole)
    magic, version, tensors, settings = cursor.take("<4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    for _ in range(settings):
        cursor.text()
        cursor.skip_value(cursor.take("<I")[0])
    infos = []
    for _ in range(tensors):
        name = cursor.text()
        shape = cursor.take(f"<{cursor.take('<I')[0]}Q")[::-1]
        infos.append((name, shape, *cursor.take("<IQ")))
    start = -(-cursor.at // 32) * 32
    return {name: GgufTensor(shape, number, whole[start + offset :]) for name, shape, number, offset in infos}


class _Cursor:
    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def text(self) -> str:
        length = self.take("<Q")[0]
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8")

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            item, count = self.take("<IQ")
            if item == _STRING:
                for _ in range(count):
                    self.text()
            else:
                self.at += count * _VALUE_BYTES[item]
        else:
            self.at += _VALUE_BYTES[kind]
