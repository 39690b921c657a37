"""Decide on the student (checked, cheap) and then build it (the one model of the training process)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distily.checkpoint.configs import json_object
from featurestore.format.tokenizer_files import tokenizer_files
from featurestore.reader import CacheReader
from student import bitnet
from student.bitnet import layout
from student.config.flags import StudentOptions
from student.errors import UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.copying import copy_from_teacher, resolve_teacher
from student.modeling.narrowing import NO_NARROWING, Narrowing, plan_narrowing
from student.modeling.other_tokenizer import NewEmbeddings, OwnTokenizer, tokenizer_files_of
from student.modeling.saving import (
    attention,
    check_latent,
    check_saved,
    new_student,
    restore,
    saved_config,
    student_config,
)
from student.modeling.shape import (
    added_tokens,
    changed_config,
    check_positions,
    check_vocabulary,
    tokenizers_differ,
)
from student.modeling.tokenizer import cut_alike, load_tokenizer
from student.modeling.whole import load_whole, local_checkpoint, whole_files


@dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """Everything that building needs.

    checkpoint: load this one; None makes a new model of `config`. layers: teacher layer of each student
    layer. teacher: files to copy from, of which `narrowing` keeps a part; None leaves random weights.
    conversion: of `bitnet.CONVERSIONS`, None for a student in full precision. converted: whether the
    checkpoint has gone through it already. alternatives: the same student from other layers of the teacher,
    for --copy-layers auto. given: a model that there is already, and that is trained itself. tokenizer: files
    of the student's, where that is not the teacher's. blocks: files of weights that were trained block by
    block in ternary layers, which take the place of those that were copied.
    """

    config: Any
    checkpoint: str | None
    layers: list[int]
    teacher: CheckpointTensors | None
    conversion: str | None
    converted: bool
    masters: str
    freeze_embeddings: bool
    narrowing: Narrowing = NO_NARROWING
    alternatives: tuple[StudentPlan, ...] = ()
    given: Any = None
    tokenizer: Path | None = None
    blocks: tuple[Path, ...] = ()

    @property
    def copied(self) -> str | None:
        """The teacher's layers that the student starts as a copy of; None where it is no copy."""
        return None if self.teacher is None or self.blocks else ",".join(map(str, self.layers))

    def build(
        self, samples: Sequence[Tensor] = (), device: torch.device | str = "cpu"
    ) -> tuple[Any, bitnet.Drift | None]:
        """The student on a device, converted to BitNet when asked for, and how far a conversion moved it; its
        seed must be set by the caller.

        samples: token ids, int64 [T] each, by which norms are calibrated and the drift is measured; without
        them norms start as ones. Weights are float32, but for latent ones with bf16 masters.
        """
        student, drift = self.start().to(device), None
        if self.conversion is not None and not self.converted:
            if self.blocks:
                drift = bitnet.convert_trained(student, self.conversion, map(load_file, self.blocks), samples)
            elif samples:
                drift = bitnet.convert_calibrated(student, self.conversion, samples)
            else:
                bitnet.convert_student(student, self.conversion)
        if self.masters == "bf16":
            bitnet.halve_masters(student)
        if self.freeze_embeddings:
            for module in (student.get_input_embeddings(), student.get_output_embeddings()):
                module.requires_grad_(False)
        return student, drift

    def start(self) -> Any:
        """The student before any conversion, in float32; or the model that was given, as it is."""
        if self.given is not None:
            return self.given
        if self.checkpoint is None:
            student = new_student(self.config)
            if self.teacher is not None:
                copy_from_teacher(student, self.layers, self.teacher, self.narrowing)
            return student
        if self.converted:
            return restore(self.config, self.conversion, Path(self.checkpoint))
        return load_whole(
            self.checkpoint,
            f"--student {self.checkpoint}",
            config=self.config,
            dtype=torch.float32,
            **attention(self.config),
        )


def plan_student(options: StudentOptions, reader: CacheReader) -> StudentPlan:
    """Check the request against the cache's teacher; UserError for the first thing that does not fit."""
    longest = int(reader.lengths.max())
    if options.student is not None:
        return _plan_checkpoint(options, reader, options.student, longest)
    flag = "--student-model-config"
    teacher_config = text_config(load_config(str(reader.teacher_dir), "the cache's teacher/"))
    own = _own_tokenizer(options, reader)
    settings = None if own is None else own.settings
    config, layers = changed_config(teacher_config, options.config_changes(), options.copy_layers, settings)
    if own is None:
        check_vocabulary(config, teacher_config, reader.identity.vocab_size, flag)
        check_positions(config, longest, flag)
    else:
        own.check(config, flag)
    teacher = None
    if options.init != "random":
        directory = resolve_teacher(options.teacher, reader.identity.name)
        teacher = CheckpointTensors(directory)
        _check_teacher(directory, teacher_config, reader)
    plan = replace(
        _planned(options, config, None, layers, teacher), tokenizer=None if own is None else own.directory
    )
    if teacher is None:
        return plan
    narrowing = plan_narrowing(teacher_config.get_text_config(), config.get_text_config())
    if own is not None:
        size = config.get_text_config().vocab_size
        narrowing = replace(narrowing, tokens=NewEmbeddings(reader.teacher_dir, own.directory, size))
    plan = replace(plan, narrowing=narrowing)
    if options.copy_layers != "auto":
        return plan
    others = (
        changed_config(teacher_config, options.config_changes(), spec, settings) for spec in ("first", "last")
    )
    alternatives = (
        replace(plan, config=other, layers=chosen) for other, chosen in others if chosen != layers
    )
    return replace(plan, alternatives=tuple(alternatives))


def _plan_checkpoint(
    options: StudentOptions, reader: CacheReader, checkpoint: str, longest: int
) -> StudentPlan:
    flag = f"--student {checkpoint}"
    check_latent(saved_config(checkpoint), flag)
    directory = local_checkpoint(checkpoint, flag)
    saved, tensors = saved_config(str(directory)), whole_files(directory, flag)
    before = layout.saved_conversion(saved)
    if before is None:
        config = load_config(str(directory), "--student")
    else:
        config = student_config(saved)
        check_saved(config, before, saved, tensors, flag)
    teacher_config = load_config(str(reader.teacher_dir), "the cache's teacher/")
    same = same_tokenizer(directory, reader.teacher_dir)
    if same is False:
        OwnTokenizer(directory, flag).check(config, flag)
    else:
        check_vocabulary(config, teacher_config, reader.identity.vocab_size, flag, bool(same))
        check_positions(config, longest, flag)
    plan = _planned(
        options=options, config=config, checkpoint=str(directory), layers=[], teacher=None, before=before
    )
    return replace(plan, tokenizer=directory if same is False else None)


def plan_given(options: StudentOptions, reader: CacheReader, model: Any) -> StudentPlan:
    """The plan for a transformers model that there is already; UserError where it does not fit the cache."""
    for name in ("student", "student_model_config", "teacher"):
        if getattr(options, name) is not None:
            raise UserError(f"model: a model was given, so {name} has no effect; leave one of them out")
    teacher_config = load_config(str(reader.teacher_dir), "the cache's teacher/")
    own = _own_tokenizer(options, reader)
    if own is None:
        check_vocabulary(model.config, teacher_config, reader.identity.vocab_size, "model")
        check_positions(model.config, int(reader.lengths.max()), "model")
    else:
        own.check(model.config, "model")
    before = bitnet.conversion_of(model)
    plan = _planned(
        options=options, config=model.config, checkpoint=None, layers=[], teacher=None, before=before
    )
    return replace(plan, given=model, tokenizer=None if own is None else own.directory)


def plan_following(options: StudentOptions, before: StudentPlan) -> StudentPlan:
    """The plan for --student, where it is what `before` has yet to become and save."""
    plan = _planned(
        options=options,
        config=before.config,
        checkpoint=options.student,
        layers=[],
        teacher=None,
        before=before.conversion,
    )
    return replace(plan, tokenizer=before.tokenizer)


def _own_tokenizer(options: StudentOptions, reader: CacheReader) -> OwnTokenizer | None:
    """That of --student-tokenizer, unless it is the teacher's."""
    if options.student_tokenizer is None:
        return None
    flag = f"--student-tokenizer {options.student_tokenizer}"
    directory = tokenizer_files_of(options.student_tokenizer, flag)
    files = [json_object(one / "tokenizer.json") for one in (directory, reader.teacher_dir)]
    more = set.difference(*(set(added_tokens(file)) for file in files))
    if same_tokenizer(directory, reader.teacher_dir) and not more:
        return None
    return OwnTokenizer(directory, flag)


def _planned(
    options: StudentOptions,
    config: Any,
    checkpoint: str | None,
    layers: list[int],
    teacher: CheckpointTensors | None,
    before: str | None = None,
) -> StudentPlan:
    """The plan, once its conversion is known to be possible; before: that of the checkpoint."""
    conversion = _conversion(options, before)
    options.check_ternary(conversion)
    if conversion == "subln" and before is None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            bitnet.normed(AutoModelForCausalLM.from_config(config).get_decoder().layers, conversion)
    converted, masters = before is not None and conversion is not None, options.bitnet_masters
    return StudentPlan(
        config=config,
        checkpoint=checkpoint,
        layers=layers,
        teacher=teacher,
        conversion=conversion,
        converted=converted,
        masters=masters,
        freeze_embeddings=options.freeze_embeddings,
    )


def _conversion(options: StudentOptions, before: str | None) -> str | None:
    """What the student becomes; UserError for what a converted checkpoint cannot become."""
    as_bitnet, wanted = options.student_model_as_bitnet, options.bitnet_conversion
    if before is None:
        return (wanted or "none") if as_bitnet else None
    if as_bitnet is False and before == "none":
        return None  # latent weights are weights
    if as_bitnet is False:
        raise UserError(
            f"--student-model-as-bitnet False: {options.student} has norms that only a BitNet student has "
            f"({before}); leave the flag out"
        )
    if wanted not in (None, before):
        raise UserError(
            f"--bitnet-conversion {wanted}: {options.student} was trained with {before}; leave the flag out, "
            "or start from the full-precision checkpoint"
        )
    return before


def load_config(source: str, what: str) -> Any:
    """The transformers configuration of a directory or hub name, as a causal language model."""
    from transformers import AutoConfig

    try:
        # Not None, with which transformers asks on the terminal whether to run a checkpoint's own code.
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what}: {source} is not a model that transformers can load ({reason})") from error


def text_config(teacher: Any) -> Any:
    """The configuration of a student with the teacher's architecture: of a teacher that also sees or hears,
    that of the class for text alone. UserError where its family has none.
    """
    from transformers import AutoModelForCausalLM

    text = teacher.get_text_config()
    if text is teacher:
        return teacher
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"the cache's teacher is a {teacher.model_type}, whose text part is no model by itself in "
            "transformers; give a student with the teacher's tokenizer: --student DIR"
        )
    return text


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


def same_tokenizer(checkpoint: Path, teacher_dir: Path) -> bool | None:
    """Whether a student has the teacher's tokenizer; None where that is not known."""
    files = [checkpoint / "tokenizer.json", teacher_dir / "tokenizer.json"]
    if all(file.is_file() for file in files):
        return not tokenizers_differ(*map(json_object, files)) and cut_alike(*files)
    if all(tokenizer_files(directory) for directory in (checkpoint, teacher_dir)):
        try:
            own, theirs = (load_tokenizer(directory).get_vocab() for directory in (checkpoint, teacher_dir))
        except (OSError, ValueError, KeyError, ImportError):
            return None
        return bool(own == theirs)
    return None
