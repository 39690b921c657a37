"""Checkpoints that give all weights of their model, in finite numbers; any other is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurestore.checkpoint import StoredTensor, explain_gaps, read_tensors, weight_files
from featurestore.errors import CheckpointError
from featurestore.finite import not_finite
from student.errors import UserError


def whole_files(directory: Path, what: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name; UserError for files that are missing, damaged or not finite.

    what: the flag and the directory, at the beginning of the line.
    """
    try:
        tensors = read_tensors(weight_files(directory))
    except CheckpointError as error:
        raise UserError(f"{what}: {error}") from None
    if wrong := not_finite(tensors):
        raise UserError(
            f"{what}: {wrong[0]} in {tensors[wrong[0]].file} holds numbers that are not finite; the "
            "checkpoint is damaged, or its training diverged: download it again, or give an earlier one"
        )
    return tensors


def load_whole(source: str | Path, what: str, **options: Any) -> Any:
    """The causal language model of a directory or hub name, in evaluation mode; `options` are transformers'.

    transformers completes what a checkpoint lacks with random numbers: UserError where it would.
    """
    from transformers import AutoModelForCausalLM

    tensors = whole_files(Path(source), what) if Path(source).is_dir() else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    mismatched = {name: (theirs, ours) for name, theirs, ours in info["mismatched_keys"]}
    if gaps := explain_gaps(info["missing_keys"], mismatched, tensors):
        raise UserError(f"{what}: {gaps}")
    return model.eval()
