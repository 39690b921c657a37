"""Checkpoints that give all weights of their model, in finite numbers; any other is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distily.checkpoint.finite import not_finite
from distily.checkpoint.weights import (
    INDEX,
    StoredTensor,
    explain_gaps,
    read_tensors,
    weight_files,
    weight_patterns,
)
from distily.errors import CheckpointError
from distily.text import one_line
from featurestore.format.tokenizer_files import TOKENIZER_PATTERNS
from student.errors import UserError


def local_checkpoint(source: str | Path, what: str) -> Path:
    """The directory of a checkpoint. Of one on the hub, its config, tokenizer and weights are downloaded, of
    the latter those that are loaded, all of one commit; UserError where the hub does not give them.

    what: the flag and the source, at the beginning of the line.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    small = ["config.json", "generation_config.json", *TOKENIZER_PATTERNS, INDEX]
    try:
        path = Path(snapshot_download(str(source), allow_patterns=small))
        return Path(snapshot_download(str(source), revision=path.name, allow_patterns=weight_patterns(path)))
    except CheckpointError as error:
        raise UserError(f"{what}: {error}") from None
    except Exception as error:  # network, authentication and naming errors share no base class
        reason = one_line(error)
        raise UserError(
            f"{what}: neither a local directory nor a model that the hub gives us: {reason}"
        ) from error


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

    directory = local_checkpoint(source, what)
    tensors = whole_files(directory, what)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
    )
    mismatched = {name: (theirs, ours) for name, theirs, ours in info["mismatched_keys"]}
    if gaps := explain_gaps(info["missing_keys"], mismatched, tensors):
        raise UserError(f"{what}: {gaps}")
    return model.eval()
