"""`DistillationTrainer`: a training from a cache, driven from a script as one drives a trainer of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import TrainOutput

from distily.logs import LOG
from featurestore.reader import CacheReader
from student.config.parser import Request
from student.config.training_config import DistillationConfig
from student.errors import UserError
from student.modeling.adapters import add_adapters, has_adapters
from student.modeling.tokenizer import load_tokenizer
from student.training.outputs import check_output, check_writable
from student.training.resume import (
    check_curriculum,
    check_kind,
    check_order,
    check_stores,
    find_checkpoint,
    manifests_to_read,
)
from student.training.run import assemble, prepare
from student.training.trainer import CacheTrainer

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

Cache = CacheReader | str | Path


class DistillationTrainer(CacheTrainer):
    """transformers' `Trainer` for a student that learns from a cache; the teacher is never loaded.

    The objective is that of `args`: Hinton et al., "Distilling the Knowledge in a Neural Network"
    (arXiv:1503.02531), unless it says otherwise.

    Args:
        model: the student: a transformers model, which is trained itself; a directory or hub name; or None
            for a student made of the teacher's configuration, changed by `args.student_model_config`, which
            starts from the teacher's weights.
        args: a `DistillationConfig`; None for one that writes into "trainer_output".
        train_dataset: a cache: an open one, or where it is; or a list of several, whose teachers teach
            together (`args.teacher_weights`).
        eval_dataset: a cache of other samples by the same teacher, all of which are held out; None for a
            share `args.eval_fraction` of the documents of `train_dataset`.
        processing_class: the tokenizer, only to be checked: token ids in a cache are those of the teacher's
            tokenizer, which is saved with the student.
        callbacks: transformers' `TrainerCallback`s.
        optimizers: an optimizer and its schedule, of which either may be None.
        peft_config: adapters of PEFT, e.g. a `LoraConfig`, for a student in full precision: only they are
            trained and saved.

    Raises:
        UserError: an argument cannot be served, alone or with this cache.
        MissingFeatureError: the cache lacks what the objective needs; the message names the flag of
            `distily-cache generate` that adds it.

    Example:
        trainer = DistillationTrainer(
            args=DistillationConfig(output_dir="out", student_model_config={"num_hidden_layers": 12}),
            train_dataset="run/cache",
        )
        trainer.train()
        trainer.save_model()
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Cache | Sequence[Cache] | None = None,
        eval_dataset: Cache | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[torch.optim.Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = DistillationConfig(output_dir="trainer_output") if args is None else copy(args)
        if not isinstance(args, DistillationConfig):
            raise UserError("args: give a DistillationConfig, which is TrainingArguments and the losses")
        if train_dataset is None:
            raise UserError("train_dataset: give a cache: a directory, s3://bucket/prefix or a CacheReader")
        if optimizers[0] is not None:
            _check_whole(args)
        if isinstance(model, (str, Path)):
            if args.student is not None:
                raise UserError("model: args.student names a checkpoint already; leave one of them out")
            args.student, model = str(model), None
            args.check()
        caches = (
            [train_dataset] if isinstance(train_dataset, (CacheReader, str, Path)) else list(train_dataset)
        )
        if any(isinstance(cache, CacheReader) for cache in caches):
            args.manifest = ",".join(
                cache.manifest_digest if isinstance(cache, CacheReader) else "" for cache in caches
            )
        if eval_dataset is not None and len(caches) > 1:
            raise UserError(
                "eval_dataset: samples that all caches of train_dataset hold are held out by "
                "args.eval_fraction; leave it out"
            )
        places = (str(cache.path if isinstance(cache, CacheReader) else cache) for cache in caches)
        # The request that `distily-train from-cache` would make of these arguments.
        request = Request(stores=tuple(places), options=args, training=args, notes=args.notes)
        check_writable(Path(args.output_dir))
        evaluated = _open_held_out(eval_dataset)
        if evaluated is not None:
            args.eval_fraction = 0.0
        prepared = prepare(request, given=model, evaluated=evaluated)
        _check_tokenizer(processing_class, prepared.plan.tokenizer or prepared.reader.teacher_dir)
        assembled = assemble(prepared)
        if str(prepared.data.split) and args.process_index == 0:
            LOG.warning(prepared.data.split)
        # Adapters go on last: what was checked against the cache is the student that they wrap.
        if peft_config is not None:
            if args.fsdp:
                raise UserError("peft_config: adapters are not sharded; leave --fsdp (args.fsdp) out")
            if prepared.plan.conversion is not None:
                raise UserError("peft_config: a BitNet student trains its own weights; leave one of them out")
            assembled.model.student = add_adapters(assembled.model.student, peft_config)
        _check_types(assembled.model.student, prepared.plan.masters)
        self._request, self._plan, self._stores = request, prepared.plan, prepared.stores
        super().__init__(
            **assembled.for_trainer(),
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; what lies in the output directory is never overwritten unasked.

        Args:
            resume_from_checkpoint: a checkpoint of such a training, or True for the last one in the output
                directory; it reads on where that one stopped.

        Returns:
            transformers' `TrainOutput`; its loss is NaN where the checkpoint is of a training that has ended
            already, which is only loaded.

        Raises:
            UserError: the output directory holds a training, and neither is it resumed nor does
                `args.overwrite_output_dir` give it up; or the checkpoint is of another training.
        """
        self.args.resume_from_checkpoint = None
        if resume_from_checkpoint:
            self.args.resume_from_checkpoint = str(resume_from_checkpoint)
        check_output(self._request)
        checkpoint = find_checkpoint(self.args)
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
        return self.train_from(checkpoint, self.args.overwrite_output_dir, **kwargs)

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """UserError where a checkpoint is of another student, or of another cache or order of it."""
        if not has_adapters(self.model.student):
            check_kind(checkpoint, self._plan)
        stores = self._stores
        digests = manifests_to_read(None, checkpoint, len(stores))
        for digest, here in zip(digests, stores.manifests, strict=True):
            if digest not in (None, here):
                raise UserError(
                    f"resume_from_checkpoint: {checkpoint} was trained on manifest {digest} of the cache, "
                    f"and this is {here}; give "
                    f"train_dataset=CacheReader.open(..., manifest={str(digest)[:12]!r})"
                )
        check_stores(checkpoint, self.model.objective.teachers)
        check_curriculum(checkpoint, self._request.options.curriculum().record())
        check_order(self.args, len(self.train_dataset), checkpoint)


def _check_whole(args: DistillationConfig) -> None:
    """UserError for what an optimizer that was made of the whole student cannot serve."""
    if args.fsdp:
        raise UserError(
            "optimizers: this one is of weights that are not sharded yet; leave it out and choose with "
            "args.optim, or leave args.fsdp out"
        )
    if (flag := args.separate_flag()) is not None:
        raise UserError(
            f"optimizers: this one has its groups of weights already, and {flag} makes others; give these "
            "groups their rates yourself, or leave one of them out"
        )


def _open_held_out(cache: Cache | None) -> CacheReader | None:
    return CacheReader.open(cache) if isinstance(cache, (str, Path)) else cache


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, teacher_dir: Path) -> None:
    """UserError where a tokenizer makes other ids of texts than the student's."""
    if tokenizer is not None and tokenizer.get_vocab() != load_tokenizer(teacher_dir).get_vocab():
        raise UserError(
            "processing_class: its vocabulary is not that of the cache's teacher, so cached token ids mean "
            "other text to it; leave it out, the teacher's is saved with the student, or give the student's "
            "own with args.student_tokenizer"
        )


def _check_types(student: Any, masters: str) -> None:
    """UserError for weights that are trained in less than float32, where steps of AdamW round to nothing."""
    if masters == "bf16":
        return
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(
                f"model: {name} is {str(parameter.dtype).removeprefix('torch.')}; load it with "
                "dtype=torch.float32 (args.bf16 computes in bfloat16 all the same)"
            )
