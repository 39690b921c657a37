"""`from-cache` from a parsed request to the summary: check, build, train, evaluate, save, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import set_seed

from distily.logs import LOG
from featurestore.reader import CacheReader
from student.bitnet import Drift, set_relative_temperatures
from student.blockwise.request import BlockwiseRequest, plan_blockwise
from student.blockwise.run import BlockwiseRun
from student.config.parser import Request
from student.config.trainer_checks import (
    check_hub,
    check_losses,
    check_metric,
    check_needs_evaluation,
    check_optimizer,
    check_schedule,
)
from student.data.batches import calibration_samples
from student.data.curriculum import plan_curriculum
from student.data.held_out import Split
from student.data.indices import longest_places
from student.data.packing import check_packing
from student.data.retokenised import RetokenisedDataset
from student.data.stores import CacheStores, open_stores
from student.data.token_map import DeviceMap
from student.data.token_statistics import TokenStatistics, token_statistics, with_choices
from student.errors import UserError
from student.modeling.other_tokenizer import other_tokens
from student.modeling.plan import StudentPlan, plan_following, plan_given, plan_student
from student.modeling.saving import stop_tokens
from student.objective.files import ObjectiveRequest
from student.objective.other_tokenizer import WHY, across_tokenizers
from student.objective.terms import Objective
from student.report import write_report
from student.training.model import DistillationModel
from student.training.outputs import check_output, check_writable
from student.training.plan import (
    DataPlan,
    load_teacher,
    plan_data,
    plan_distribution,
    plan_matched,
    plan_objective,
    plan_split,
)
from student.training.provenance import environment, typed
from student.training.resume import (
    check_curriculum,
    check_kind,
    check_order,
    check_stores,
    check_tokenizer,
    find_checkpoint,
    manifests_to_read,
)
from student.training.summary import TrainingRun, summarise
from student.training.teachers import (
    check_mixture,
    final_weights,
    measured_words,
    weights_of,
    widest_of,
)
from student.training.trainer import CacheTrainer
from student.training.uniform import best_copy

LONGEST = 8  # samples that are checked to fit a student with another tokenizer


@dataclass(frozen=True, kw_only=True)
class PreparedTraining:
    """A request that was checked, and what follows from it and the caches.

    checkpoint: where it resumes; None: at the start. tokens: what is aligned, where the student has a
    tokenizer of its own. blockwise: blocks that are trained before the whole student, if any are.
    """

    request: Request
    stores: CacheStores
    checkpoint: Path | None
    plan: StudentPlan
    objective: Objective
    data: DataPlan
    tokens: TokenStatistics | None = None
    blockwise: BlockwiseRequest | None = None

    @property
    def reader(self) -> CacheReader:
        """The first cache, whose teacher gives the student its shape and its tokenizer."""
        return self.stores.first

    @property
    def token_tables(self) -> DeviceMap | None:
        """What the teacher's tokens are to a student with another tokenizer."""
        train = self.data.train
        return DeviceMap.of(train.other.tokens) if isinstance(train, RetokenisedDataset) else None

    @property
    def stops(self) -> list[int]:
        """What a student with another tokenizer reads where the teacher's texts and turns end."""
        train = self.data.train
        specials = train.other.retokenise.specials if isinstance(train, RetokenisedDataset) else {}
        return [specials[one] for one in stop_tokens(self.reader.teacher_dir) if one in specials]

    @property
    def vocab_size(self) -> int:
        """Tokens that the student tells apart."""
        own = int(self.plan.config.get_text_config().vocab_size)
        return self.reader.identity.vocab_size if self.plan.tokenizer is None else own


@dataclass(frozen=True)
class Assembled:
    """The student with its objective. drift: how far a conversion to BitNet moved it."""

    prepared: PreparedTraining
    model: DistillationModel
    drift: Drift | None

    def for_trainer(self) -> dict[str, Any]:
        """What `CacheTrainer` takes."""
        request, reader, data = self.prepared.request, self.prepared.reader, self.prepared.data
        return {
            "model": self.model,
            "args": request.training,
            "train_dataset": data.train,
            "eval_dataset": data.held_out,
            "vocab_size": self.prepared.vocab_size,
            "tokenizer_dir": self.prepared.plan.tokenizer or reader.teacher_dir,
            "stops": self.prepared.stops,
            "pack_rows": request.options.pack_rows,
            "ternary": request.options.ternary(),
            "drift": self.drift,
            "held_out_documents": data.split.held_out_documents,
            "copied": self.prepared.plan.copied,
        }


@dataclass(frozen=True)
class Built:
    """The student with its objective, and what trains it."""

    assembled: Assembled
    trainer: CacheTrainer


def train_from_cache(request: Request, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and write checkpoints, student, report.html and summary.json into the output directory.

    command: the words that are noted in the summary, those of this process when left out. Returns the
    summary. Everything that can be wrong with the request is found before the student is built.
    """
    check_output(request)
    return train(build(prepare(request)), command)


def prepare(
    request: Request,
    before: StudentPlan | None = None,
    given: Any = None,
    evaluated: CacheReader | None = None,
) -> PreparedTraining:
    """Find everything that can be wrong with a request, before any student is built.

    before: the student that this one starts from, where a stage before has yet to save it. given: a model
    that is to be trained itself. evaluated: the cache of the held-out samples; None for a fraction of the one
    that is trained on.
    """
    options, args = request.options, request.training
    checkpoint = find_checkpoint(args)
    wanted = options.wanted()
    stores = _open(request, wanted, checkpoint)
    reader = stores.first
    if given is not None:
        plan = plan_given(options, reader, given)
    else:
        plan = plan_student(options, reader) if before is None else plan_following(options, before)
    if checkpoint is not None:
        check_kind(checkpoint, plan)
    split = plan_split(reader, options.eval_fraction, options.train_samples, evaluated, stores)
    # Samples of another cache have no states here.
    measured = split if evaluated is None else replace(split, held_out=[])
    blockwise = plan_blockwise(options, plan, stores, measured)
    objective = plan_objective(wanted, stores, plan.config, split.training)
    if plan.tokenizer is not None:
        objective = _across_tokenizers(request, objective, stores)
    elif options.token_map is not None:
        raise UserError("--token-map has no effect on a student with the teacher's tokenizer; leave it out")
    if options.pack_rows and any(term.loss.kind == "relation" for term in objective.terms):
        raise UserError("--pack-rows: losses on attention take a row for one sample; leave one of them out")
    data = _plan_data(request, objective, stores, split, evaluated, plan)
    tokens = _look_at_tokens(data, stores)
    check_tokenizer(checkpoint, data.train.record())
    check_order(args, len(data.train), checkpoint)
    if data.held_out is None:
        check_needs_evaluation(args)
        args.eval_strategy, args.eval_on_start = "no", False
    check_metric(args, own_tokenizer=plan.tokenizer is not None)
    check_optimizer(args, plan.masters, options.separate_flag())
    check_schedule(args, options.bitnet_two_stage)
    check_hub(args)
    check_losses(args, objective)
    return PreparedTraining(
        request=request,
        stores=stores,
        checkpoint=checkpoint,
        plan=plan,
        objective=objective,
        data=data,
        tokens=tokens,
        blockwise=blockwise,
    )


def _across_tokenizers(request: Request, objective: Objective, stores: CacheStores) -> Objective:
    """The objective of a student with another tokenizer; UserError for what does not go with that."""
    options = request.options
    if len(stores) > 1:
        raise UserError(f"several STOREs: not supported where {WHY}; give one of them")
    for flag, given in {"--pack-rows": options.pack_rows, "--weight": options.weight is not None}.items():
        if given:
            raise UserError(f"{flag}: not supported where {WHY}; leave it out")
    learned = plan_distribution(objective, stores.first, options.top_k, options.top_p, options.tail)
    whole = widest_of(stores.first)
    return across_tokenizers(
        objective, learned or whole, whole, stores.first.identity.vocab_size, options.token_map
    )


def _look_at_tokens(data: DataPlan, stores: CacheStores) -> TokenStatistics | None:
    if not isinstance(data.train, RetokenisedDataset):
        return None
    reader = stores.first
    return token_statistics(reader, data.split.training, data.train.other, widest_of(reader))


def _open(request: Request, wanted: ObjectiveRequest, checkpoint: Path | None) -> CacheStores:
    """The caches, as a checkpoint has read them."""
    manifests = manifests_to_read(request.options.manifest, checkpoint, len(request.stores))
    weights = final_weights(wanted, request.options.shares(), len(request.stores))
    stores = open_stores(request.stores, manifests, weights)
    check_stores(checkpoint, weights_of(wanted, stores))
    check_curriculum(checkpoint, request.options.curriculum().record())
    return stores


def _plan_data(
    request: Request,
    objective: Objective,
    stores: CacheStores,
    split: Split,
    evaluated: CacheReader | None,
    plan: StudentPlan,
) -> DataPlan:
    """What is read of the caches, or of the only one."""
    options = request.options
    learned = [
        plan_distribution(objective, reader, options.top_k, options.top_p, options.tail, store)
        for store, reader in enumerate(stores.readers)
    ]
    check_mixture(objective, stores, learned)
    curriculum = plan_curriculum(options.curriculum(), stores, split.training)
    if len(stores) > 1:
        return plan_matched(objective, stores, split, learned, curriculum)
    other = None
    if plan.tokenizer is not None:
        longest = getattr(plan.config.get_text_config(), "max_position_embeddings", None)
        other = other_tokens(stores.first, plan.tokenizer, longest)
        for place in longest_places(stores.first.lengths, split.training, LONGEST):
            other(stores.first.read_codes(split.training[place], []))  # refuses a sample that is too long
        other = with_choices(stores.first, split.training, other)
    return plan_data(objective, stores.first, split, learned[0], evaluated, curriculum, other)


def build(prepared: PreparedTraining) -> Built:
    """The student and its trainer, from the request's seed."""
    args = prepared.request.training
    check_writable(Path(args.output_dir))
    assembled = assemble(prepared)
    return Built(assembled, CacheTrainer(**assembled.for_trainer()))


def assemble(prepared: PreparedTraining) -> Assembled:
    """The student with its objective, from the request's seed. The first process logs what was chosen."""
    options, args = prepared.request.options, prepared.request.training
    if args.process_index == 0:
        for note in prepared.request.notes:
            LOG.info(note)
        if len(prepared.stores) > 1:
            LOG.info(prepared.stores)
            LOG.info(measured_words(prepared.objective, prepared.stores))
        if prepared.tokens is not None:
            LOG.info(prepared.tokens)
        if prepared.data.train.curriculum is not None:
            LOG.info(prepared.data.train.curriculum.said)
    samples = calibration_samples(prepared.data.train)
    plan, chosen = prepared.plan, None
    if prepared.blockwise is None:
        plan, chosen = best_copy(plan, samples, args.device)
    elif prepared.checkpoint is None:
        if options.pack_rows:  # refused before the blocks, which take long
            check_packing(plan.start())
        blocks = BlockwiseRun(prepared.blockwise, args).train(options.overwrite_output_dir)
        plan = replace(plan, blocks=blocks)
    if chosen is not None and args.process_index == 0:
        LOG.warning(chosen)
    prepared = replace(prepared, plan=plan)
    set_seed(args.seed)
    student, drift = plan.build(samples, args.device)
    if options.bitnet_anneal:
        set_relative_temperatures(student, samples)
    if options.pack_rows:
        check_packing(student)
    teachers = [
        load_teacher(prepared.objective, reader, store)
        for store, reader in enumerate(prepared.stores.readers)
    ]
    model = DistillationModel(student, prepared.objective, *teachers, tokens=prepared.token_tables)
    return Assembled(prepared, model, drift)


def train(built: Built, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what was built, save it and write its report; the summary ({} in all processes but the first).

    command: the words that ask for this training, those of this process when left out.
    """
    trainer, prepared = built.trainer, built.assembled.prepared
    data = prepared.data
    if str(data.split) and trainer.is_world_process_zero():
        LOG.warning(data.split)
    start, started = time.perf_counter(), datetime.now(UTC)
    trainer.train_from(prepared.checkpoint, prepared.request.options.overwrite_output_dir)
    seconds = time.perf_counter() - start
    if data.held_out is not None and not _evaluated_last_step(trainer):
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return {}
    run = TrainingRun(
        stores=prepared.stores,
        model=built.assembled.model,
        state=trainer.state,
        output_dir=Path(trainer.args.output_dir),
        seconds=seconds,
        train_samples=len(data.train),
        held_out_samples=len(data.held_out or ()),
        eval_fraction=prepared.request.options.eval_fraction,
        command=command or typed(),
        environment=environment(trainer.args.device, started),
        drift=built.assembled.drift,
        split=data.split,
        copied=prepared.plan.copied,
        curriculum=data.train.curriculum,
        vocab_size=prepared.vocab_size,
        tokens=prepared.tokens,
        blockwise=None
        if prepared.blockwise is None
        else BlockwiseRun(prepared.blockwise, trainer.args).summary(),
    )
    summary = summarise(run)
    if "load_tokenizer_with" in summary:
        LOG.warning(
            f"{run.output_dir}: for a model of type {built.assembled.model.config.model_type} AutoTokenizer "
            "of transformers takes another tokenizer than was saved, with other ids; load it with "
            f"{summary['load_tokenizer_with']}.from_pretrained"
        )
    write_report(run.output_dir)
    return summary


def _evaluated_last_step(trainer: CacheTrainer) -> bool:
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step
