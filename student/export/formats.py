"""The formats that a student is exported to, and the request for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from student.errors import UserError
from student.export import hf_bitnet
from student.export.source import Source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Format:
    """One format: what it refuses, how it is written, and who reads it back.

    scale_dtype: how it stores the scale of a ternary matrix. dtype: of everything else by default.
    """

    reader: str
    scale_dtype: torch.dtype
    dtype: str
    check: Callable[[Source], None]
    write: Callable[[Source, Path, torch.dtype], None]
    read: Callable[[Path], Any]
    ternary_bytes: Callable[[Source], int]


def formats() -> dict[str, Format]:
    """The formats by the name that --format takes."""
    return {
        "hf-bitnet": Format(
            "transformers",
            torch.float32,
            "bfloat16",
            hf_bitnet.check,
            hf_bitnet.write,
            hf_bitnet.read,
            hf_bitnet.ternary_bytes,
        ),
    }


@dataclass(frozen=True)
class ExportRequest:
    """directory: a BitNet student. dtype: of embeddings, head, norms and biases; None takes the format's."""

    directory: Path
    format: str
    out: Path | None = None
    dtype: str | None = None

    def target(self) -> Path:
        return self.out or self.directory.with_name(f"{self.directory.resolve().name}-{self.format}")


def choose(request: ExportRequest) -> Format:
    """The format that is asked for; UserError for names that are none."""
    known = formats()
    if request.format not in known:
        raise UserError(f"--format {request.format}: choose one of {', '.join(known)}")
    if request.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {request.dtype}: choose one of {', '.join(DTYPES)}")
    return known[request.format]
