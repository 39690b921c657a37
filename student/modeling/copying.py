"""Copying a student's initial weights out of the teacher's checkpoint files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from student.errors import UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.narrowing import Narrowing


def layer_prefix(model: Any) -> str:
    """Name of the list of decoder layers with a final dot, e.g. `model.layers.`."""
    layers = model.get_decoder().layers
    name: str = next(name for name, module in model.named_modules() if module is layers)
    return name + "."


# How the decoder's names begin in a checkpoint of a class that also sees: ours -> theirs.
_NESTED = (
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def named_in(available: CheckpointTensors, name: str) -> str:
    """The tensor that a text model calls `name`, by its name in the checkpoint, also where the text model is
    a part of that; `name` itself where there is none.
    """
    nested = (theirs + name.removeprefix(ours) for ours, theirs in _NESTED if name.startswith(ours))
    return next((candidate for candidate in (name, *nested) if candidate in available), name)


def source_names(
    model: Any, layers: Sequence[int], available: CheckpointTensors, tied: bool
) -> dict[str, str]:
    """Student parameter -> teacher tensor: layer i takes layer `layers[i]`, all else the tensor of the same
    name.

    A head that is tied in the teacher and not in the student starts from the teacher's embeddings. tied: the
    teacher's are; an untied one without a head is not whole.
    """
    prefix = layer_prefix(model)
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = parameters[id(model.get_input_embeddings().weight)]
    head = parameters[id(model.get_output_embeddings().weight)]
    names = {}
    for name in parameters.values():
        source = name
        if name.startswith(prefix):
            index, rest = name[len(prefix) :].split(".", 1)
            source = f"{prefix}{layers[int(index)]}.{rest}"
        elif name == head and tied and named_in(available, name) not in available:
            source = embeddings
        names[name] = named_in(available, source)
    return names


@torch.no_grad()
def copy_from_teacher(
    model: nn.Module,
    layers: Sequence[int],
    teacher: CheckpointTensors,
    narrowing: Narrowing,
    without: Collection[str] = (),
) -> None:
    """Fill every parameter of `model` but those `without` from the teacher's files, of which `narrowing`
    keeps a part; names and shapes are all checked before any copy.

    UserError when the checkpoint lacks a tensor or a shape differs.
    """
    sources = source_names(model, layers, teacher, _is_tied(teacher.directory))
    names = {name: source for name, source in sources.items() if name not in without}
    parameters = dict(model.named_parameters())
    _check(names, parameters, teacher, narrowing)
    wanted: dict[str, list[str]] = {}
    for name, source in names.items():
        wanted.setdefault(source, []).append(name)
    for source, tensor in teacher.read(wanted):
        for name in wanted[source]:
            parameters[name].copy_(narrowing(name, tensor))


def _is_tied(directory: Path) -> bool:
    """Whether the config beside the weights ties head and embeddings."""
    from transformers import AutoConfig

    return bool(
        AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().tie_word_embeddings
    )


def _check(
    names: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    teacher: CheckpointTensors,
    narrowing: Narrowing,
) -> None:
    missing = [source for source in names.values() if source not in teacher]
    if missing:
        raise UserError(
            f"--init teacher: {teacher.directory} has no tensor {missing[0]!r}, which the student needs; "
            "start with "
            "--init random"
        )
    shapes = teacher.shapes(names.values())
    for name, source in names.items():
        own, theirs = tuple(parameters[name].shape), narrowing.shape(name, shapes[source])
        if own != theirs:
            raise UserError(
                f"--init teacher: {name} is {_times(own)} in the student but {_times(shapes[source])} in the "
                "teacher; of this tensor it is not known which part to copy, use --init random"
            )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def resolve_teacher(flag: str | None, recorded: str) -> Path:
    """Directory of the teacher's weights: --teacher, else the name in the cache as a directory or a cached
    hub snapshot.

    Nothing is downloaded. UserError when there is no such directory.
    """
    if flag is not None:
        if not Path(flag).is_dir():
            raise UserError(
                f"--teacher {flag}: no such directory; give the one with the teacher's safetensors"
            )
        return Path(flag)
    if Path(recorded).is_dir():
        return Path(recorded)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(recorded, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise UserError(
            f"the teacher's weights ({recorded}) are not on this machine; give their directory with "
            "--teacher DIR, "
            "or start from random weights with --init random"
        ) from None
