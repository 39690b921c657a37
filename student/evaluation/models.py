"""The models of an evaluation, one at a time in memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distily.text import one_line
from student.config.precision import inference_device, inference_dtype
from student.errors import UserError
from student.export.generation import load, student_tokenizer
from student.modeling.plan import load_config
from student.modeling.saving import attention, saved_config
from student.modeling.tokenizer import load_tokenizer
from student.modeling.whole import load_whole


@dataclass(frozen=True)
class Side:
    """A model that is evaluated: where it lies, its tokenizer, and the positions that it takes (None: no
    limit known). dtype: of a teacher's weights, None for a student.
    """

    source: str
    tokenizer: Any
    positions: int | None
    dtype: str | None = None

    def load(self) -> Any:
        """In evaluation mode, on the GPU where there is one. A student is in float32, its ternary matrices
        packed.
        """
        model = load(Path(self.source)) if self.dtype is None else _teacher(self.source, self.dtype)
        return model.to(inference_device())


def student_side(directory: Path) -> Side:
    """UserError for what is no student."""
    tokenizer = student_tokenizer(directory)
    return Side(str(directory), tokenizer, _positions(saved_config(str(directory))))


def teacher_side(source: str, dtype: str) -> Side:
    """UserError for what transformers cannot load as a causal language model with a tokenizer."""
    load_config(source, "--teacher")
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--teacher {source} has no tokenizer that transformers can load") from error
    return Side(source, tokenizer, _positions(saved_config(source)), dtype)


def free_memory() -> None:
    """After the last name of a model is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _teacher(source: str, dtype: str) -> Any:
    config = load_config(source, "--teacher")
    saved = str(config.dtype).removeprefix("torch.")
    if dtype == "auto" and inference_dtype(saved) != saved:
        dtype = inference_dtype(saved)
    try:
        return load_whole(source, f"--teacher {source}", dtype=dtype, **attention(config))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error, None)
        raise UserError(f"--teacher {source}: cannot be loaded ({reason})") from error


def _positions(config: dict[str, Any]) -> int | None:
    text = config.get("text_config") or config
    positions: int | None = text.get("max_position_embeddings")
    return positions
