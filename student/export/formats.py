"""The formats that a student is exported to, and the request for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from student.errors import UserError
from student.export import bitblas, compressed_tensors, hf_bitnet
from student.export.gguf import reading as gguf_reading
from student.export.gguf import writing as gguf
from student.export.gguf.types import TYPES
from student.export.source import ExportSource

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format: what it refuses, how it is written, and who reads it back.

    dtype: of what is not ternary, by default. fit: make the student's numbers those that the file can hold,
    so that it is the reference for the file's readers.
    """

    reader: Callable[[ExportSource], str]
    dtype: str
    check: Callable[[ExportSource], None]
    fit: Callable[[ExportSource, torch.dtype], None]
    write: Callable[[ExportSource, Path, torch.dtype], None]
    read: Callable[[Path, ExportSource], Any]
    ternary_bytes: Callable[[ExportSource], int]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """directory: a BitNet student. dtype: of embeddings, head, norms and biases; None takes the format's.
    gguf_type: of the blocks, for gguf alone.
    """

    directory: Path
    format: str
    out: Path | None = None
    dtype: str | None = None
    gguf_type: str | None = None

    def target(self) -> Path:
        return self.out or self.directory.with_name(f"{self.directory.resolve().name}-{self.format}")


def _of_transformers(module: Any) -> Format:
    """A format that transformers reads, from the module that has its functions."""
    return Format(
        reader=lambda source: "transformers",
        dtype="bfloat16",
        check=module.check,
        fit=hf_bitnet.fit,
        write=module.write,
        read=module.read,
        ternary_bytes=module.ternary_bytes,
    )


def _bitblas() -> Format:
    """The files of hf-bitnet, multiplied by another kernel."""
    return replace(
        _of_transformers(hf_bitnet),
        reader=lambda source: "BitBLAS",
        check=bitblas.check,
        read=bitblas.read,
    )


def _gguf(name: str) -> Format:
    if name not in TYPES:
        raise UserError(f"--gguf-type {name}: choose one of {', '.join(TYPES)}")
    kind = TYPES[name]

    def reader(source: ExportSource) -> str:
        known = gguf_reading.by_transformers(source, kind)
        return "transformers" if known else "its own decoder, since transformers reads no such file"

    return Format(
        reader=reader,
        dtype="float16",
        check=lambda source: gguf.check(source, kind),
        fit=gguf.fit,
        write=lambda source, out, dtype: gguf.write(source, out, dtype, kind),
        read=lambda out, source: gguf_reading.read(gguf.file_in(out, kind), source, kind),
        ternary_bytes=lambda source: sum(
            rows * columns // kind.columns * kind.block_bytes for rows, columns in source.shapes.values()
        ),
    )


FORMATS = ("hf-bitnet", "gguf", "compressed-tensors", "bitblas")


def choose(request: ExportRequest) -> Format:
    """The format that is asked for; UserError for names that are none."""
    if request.format not in FORMATS:
        raise UserError(f"--format {request.format}: choose one of {', '.join(FORMATS)}")
    if request.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {request.dtype}: choose one of {', '.join(DTYPES)}")
    if request.gguf_type is not None and request.format != "gguf":
        raise UserError(f"--gguf-type means nothing with --format {request.format}; leave it out")
    if request.format == "gguf":
        return _gguf(request.gguf_type or "TQ2_0")
    if request.format == "bitblas":
        return _bitblas()
    return _of_transformers(
        {"hf-bitnet": hf_bitnet, "compressed-tensors": compressed_tensors}[request.format]
    )
