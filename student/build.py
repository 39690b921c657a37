"""Decide on the student (checked, cheap) and then build it (the one model of the training process)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore.reader import CacheReader
from student import bitnet
from student.errors import UserError
from student.init import copy_from_teacher, resolve_teacher
from student.options import StudentOptions
from student.shape import changed_config, check_positions, check_vocabulary, tokenizers_differ
from student.weights import CheckpointTensors


@dataclass(frozen=True)
class StudentPlan:
    """Everything that building needs.

    checkpoint: load this one; None makes a new model of `config`. layers: teacher layer of each student
    layer. teacher: files to copy from; None leaves random weights.
    """

    config: Any
    checkpoint: str | None
    layers: list[int]
    teacher: CheckpointTensors | None
    as_bitnet: bool
    freeze_embeddings: bool

    def build(self) -> Any:
        """The student in float32, converted to BitNet when asked for; its seed must be set by the caller."""
        from transformers import AutoModelForCausalLM

        if self.checkpoint is not None:
            model = AutoModelForCausalLM.from_pretrained(
                self.checkpoint, config=self.config, dtype=torch.float32
            )
        else:
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        if self.teacher is not None:
            copy_from_teacher(model, self.layers, self.teacher)
        if self.as_bitnet:
            bitnet.convert(model.get_decoder().layers)
        if self.freeze_embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.requires_grad_(False)
        return model


def plan_student(options: StudentOptions, reader: CacheReader) -> StudentPlan:
    """Check the request against the cache's teacher; UserError for the first thing that does not fit."""
    longest = int(reader.lengths.max())
    if options.student is not None:
        return _plan_checkpoint(options, reader, options.student, longest)
    flag = "--student-model-config"
    teacher_config = load_config(str(reader.teacher_dir), "the cache's teacher/")
    config, layers = changed_config(teacher_config, options.config_changes(), options.copy_layers)
    check_vocabulary(config, teacher_config, reader.identity.vocab_size, flag)
    check_positions(config, longest, flag)
    teacher = None
    if options.init == "teacher":
        directory = resolve_teacher(options.teacher, reader.identity.name)
        teacher = CheckpointTensors(directory)
        _check_teacher(directory, teacher_config, reader)
    as_bitnet = bool(options.student_model_as_bitnet)
    return StudentPlan(config, None, layers, teacher, as_bitnet, options.freeze_embeddings)


def _plan_checkpoint(
    options: StudentOptions, reader: CacheReader, checkpoint: str, longest: int
) -> StudentPlan:
    flag = f"--student {checkpoint}"
    config = load_config(checkpoint, "--student")
    teacher_config = load_config(str(reader.teacher_dir), "the cache's teacher/")
    same = _same_tokenizer(Path(checkpoint), reader.teacher_dir, flag)
    check_vocabulary(config, teacher_config, reader.identity.vocab_size, flag, same)
    check_positions(config, longest, flag)
    as_bitnet = _drop_bitnet(config, flag)
    if options.student_model_as_bitnet is not None:
        as_bitnet = options.student_model_as_bitnet
    return StudentPlan(config, checkpoint, [], None, as_bitnet, options.freeze_embeddings)


def load_config(source: str, what: str) -> Any:
    """The transformers configuration of a directory or hub name, as a causal language model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what}: {source} is not a model that transformers can load ({reason})") from error


def _drop_bitnet(config: Any, flag: str) -> bool:
    """Remove our own BitNet entry, so that the latent weights load as plain ones; whether there was one."""
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return False
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    if (entry.get("quant_method"), entry.get("quantization_mode")) != ("bitnet", "online"):
        raise UserError(
            f"{flag}: a checkpoint quantised with {entry.get('quant_method')!r} has no latent weights to "
            "train; "
            "give the full-precision one"
        )
    del config.quantization_config
    return True


def _check_teacher(directory: Path, teacher_config: Any, reader: CacheReader) -> None:
    """UserError when the weights are evidently not those of the cache's teacher."""
    config = load_config(str(directory), "--teacher").get_text_config()
    identity = reader.identity
    for name, theirs in (
        ("vocab_size", teacher_config.get_text_config().vocab_size),
        ("hidden_size", identity.hidden_size),
        ("num_hidden_layers", identity.num_layers),
    ):
        if getattr(config, name) != theirs:
            raise UserError(
                f"--teacher {directory}: {name} is {getattr(config, name)}, but the cache was made by a "
                "teacher with "
                f"{theirs} ({identity.name}); give that teacher's directory"
            )


def _same_tokenizer(checkpoint: Path, teacher_dir: Path, flag: str) -> bool:
    """Whether the student is known to have the teacher's tokenizer; UserError when it has another."""
    files = [checkpoint / "tokenizer.json", teacher_dir / "tokenizer.json"]
    if not all(file.is_file() for file in files):
        return False
    if tokenizers_differ(*(json.loads(file.read_text(encoding="utf-8")) for file in files)):
        raise UserError(
            f"{flag}: its tokenizer is not the one of the cache's teacher, so cached token ids mean other "
            "text to it; "
            "choose a student with the teacher's tokenizer"
        )
    return True
