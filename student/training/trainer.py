"""transformers' Trainer on a DistillationModel: losses by term, held-out metrics, saving and resuming the
student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from distily.system.files import write_json
from featurestore.order import ORDER_VERSION
from student.bitnet import (
    Drift,
    RoundingAdamW,
    TernaryCallback,
    TernaryPlan,
    conversion_of,
    separate_rates,
    staged,
)
from student.data.batches import CachedDataset, CacheOrder, Collator
from student.data.matched import collator_of
from student.metrics import cluster_error, perplexity
from student.modeling.adapters import has_adapters, load_adapters, save_adapters
from student.modeling.saving import MANIFEST_FILE, load_weights, save_student
from student.shards import gather, is_sharded, shard_optimizer_state, whole_state
from student.training.balance import EVERY, GradientBalance, gradient_norms
from student.training.compiled import compile_layers
from student.training.finite import check_terms, check_weights
from student.training.model import BYTE_COLUMNS, EVAL_COLUMNS, DistillationModel
from student.training.outputs import remove_training
from student.training.provenance import without_secrets
from student.training.resume import KeptCallback, finished, order_seed
from student.training.sharding import shard, without_accelerates
from student.training.uniform import UniformGuess


class CacheTrainer(Trainer):  # type: ignore[misc]
    """Trains `model.student`; every checkpoint is a directory that `from_pretrained` loads."""

    def __init__(
        self,
        model: DistillationModel,
        args: TrainingArguments,
        train_dataset: CachedDataset,
        eval_dataset: CachedDataset | None,
        vocab_size: int,
        tokenizer_dir: Path,
        stops: Sequence[int] = (),
        pack_rows: bool = False,
        ternary: TernaryPlan | None = None,
        drift: Drift | None = None,
        held_out_documents: Sequence[int] = (),
        copied: str | None = None,
        **options: Any,
    ) -> None:
        pad = model.config.get_text_config().pad_token_id
        self._pad_token = pad if isinstance(pad, int) and 0 <= pad < vocab_size else 0
        self._tokenizer_dir, self._stops = tokenizer_dir, stops
        self._train_collator = self._collator(train_dataset, pack_rows, drop_idle=True)
        self._whole: dict[str, Tensor] | None = None  # the weights of a sharded model, while it is saved
        if args.fsdp:
            shard(model, args.device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self._train_collator,
            compute_metrics=partial(held_out_metrics, held_out_documents),
            optimizer_cls_and_kwargs=_rounding(args) if ternary and ternary.masters == "bf16" else None,
            **options,
        )
        compile_layers(model.student, self._dynamo)
        self.add_callback(KeptCallback())
        self._term_sums = torch.zeros(len(model.objective.labels), device=args.device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self._term_start: int | None = None  # the step after which _term_sums began to add up
        self._balance = GradientBalance(len(model.objective.terms)) if model.objective.balanced else None
        self._measured: int | None = None  # the step at which gradient norms were measured last
        self._ternary: TernaryCallback | None = None
        self._drift = drift
        self._ternary_plan = ternary or TernaryPlan()
        self._two_stage = self._ternary_plan.two_stage
        if conversion_of(model.student) is not None:
            self._ternary = TernaryCallback(model.student, self._ternary_plan)
            self.add_callback(self._ternary)
        self.add_callback(UniformGuess(vocab_size, copied, rounded=drift is not None))

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Trainer's own, without its wish to compile the whole model, see `student.training.compiled`."""
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        self._dynamo: TorchDynamoPlugin = arguments["dynamo_plugin"]
        return arguments | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _collator(self, dataset: CachedDataset, pack: bool, drop_idle: bool) -> Collator:
        return collator_of(dataset, self._pad_token, pack, drop_idle)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own; accelerate shards nothing, see `student.training.sharding`."""
        with without_accelerates():
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Trainer's own; a sharded model is there already, and cannot be moved."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def compute_loss_context_manager(self) -> ExitStack:
        """Trainer's own, with the autocast that accelerate puts around a model that it wraps."""
        stack: ExitStack = super().compute_loss_context_manager()
        if is_sharded(self.model):
            stack.enter_context(self.accelerator.autocast())
        return stack

    def _get_train_sampler(self, train_dataset: CachedDataset | None = None) -> CacheOrder:
        """The cache's own order: whole shards in windows, and the same for any number of processes."""
        return CacheOrder(
            train_dataset or self.train_dataset,
            order_seed(self.args),
            self.get_total_train_batch_size(self.args),
            lambda: int(self.state.epoch or 0),
            self.args.dataloader_drop_last,
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's rule, without parameters that stand for a matrix and are not one: decay would turn an
        orthogonal projector, not shrink it.
        """
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".parametrizations." not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's own, with the latent weights in groups of their own where they have rates of their
        own.
        """
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made:
            separate_rates(optimizer, self.model, self._ternary_plan)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's own, with a second stage where there is to be one."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self._two_stage:
            staged(schedule, num_training_steps)
            self._two_stage = False
        return schedule

    def get_eval_dataloader(self, eval_dataset: CachedDataset | None = None) -> Any:
        """Evaluation reads other column groups than training, so it has its own collator; it adds up by rows,
        so each holds one sample.
        """
        self.data_collator = self._collator(eval_dataset or self.eval_dataset, pack=False, drop_idle=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._train_collator

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's own, which divides by the learned positions of the whole accumulated batch; remembers the
        terms.
        """
        if model.training:
            self._set_weights(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if "terms" in outputs:
            self._term_sums += outputs["terms"]
            self._term_start = self.state.global_step if self._term_start is None else self._term_start
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | int | None:
        """Trainer's own: the learned positions of a step, of all its parts and processes; where positions
        have weights, the sum of these, so that however a step is cut its loss is the same weighted mean.
        """
        if not batch_samples or "weight" not in batch_samples[0]:
            count: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
            return count
        # In float64: weights are multiples of 1/64, so that this sum is exact.
        total = torch.stack([batch["weight"].double().sum() for batch in batch_samples]).sum()
        total = total.float().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        weights: Tensor = total
        return weights

    def _set_weights(self, inputs: dict[str, Any]) -> None:
        """Weights move between optimizer steps, not between parts of an accumulated batch; gradient norms are
        measured on the first part.
        """
        step, objective = self.state.global_step, self.model.objective
        progress = step / max(self.state.max_steps, 1)
        self.model.shares = objective.shares_at(progress)
        weights = objective.weights_at(progress)
        if self._balance is not None:
            if step % EVERY == 0 and self._measured != step:
                self._measured = step
                with self.compute_loss_context_manager():
                    norms = gradient_norms(self.model, inputs)
                self._balance.update(self.accelerator.reduce(norms.square(), "mean").sqrt().tolist())
            weights = self._balance.weights(weights)
        self.model.weights = weights

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Trainer's own count, left on the device: to read each batch's is to wait for it."""
        counting = self.args.include_num_input_tokens_seen
        if counting == "non_padding":
            self._tokens += inputs["attention_mask"].sum()
        elif counting != "no":
            self._tokens += inputs["input_ids"].numel()

    def store_flos(self) -> None:
        """Trainer's own, before it logs or saves: brings what it has counted into its state."""
        super().store_flos()
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(self._tokens, "sum"))
        self._tokens.zero_()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the unweighted terms, the weights and the teachers' shares that move, and the movement of the
        ternary weights to Trainer's training log.
        """
        if "loss" in logs and self._term_start is not None:
            steps = self.state.global_step - self._term_start
            reduction = "sum" if self.args.average_tokens_across_devices else "mean"
            means = self.accelerator.reduce(self._term_sums, reduction) / steps
            terms = dict(zip(self.model.objective.labels, means.tolist(), strict=True))
            check_terms(terms, self._term_start + 1, self.state.global_step)
            logs |= {f"loss_{label}": mean for label, mean in terms.items()}
            if self.model.objective.weights_move:
                names = [f"weight_{label}" for label in self.model.objective.labels]
                logs |= dict(zip(names, self.model.weights, strict=True))
            if self.model.objective.shares_move:
                logs |= {f"share_teacher{store}": one for store, one in enumerate(self.model.shares)}
            if self._drift is not None and self._term_start == 0:
                drifts = asdict(self._drift).items()
                logs |= {f"step0_drift_{what}": value for what, value in drifts if value is not None}
                self._drift = None
            self._term_sums.zero_()
            self._term_start = None
            logs |= self._ternary.measure(self.args.learning_rate) if self._ternary else {}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(None, sums per sequence [B, columns], their number of positions [B]); `held_out_metrics` adds them
        up.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(**inputs)["sums"]
        return None, sums, sums[:, EVAL_COLUMNS.index("positions")]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's own; drops what is around the layers, which a pass without gradients leaves gathered."""
        output = super().evaluation_loop(*args, **kwargs)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; what ends it early is said on a line of its own, behind the progress bar's."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                for bar in ("prediction_bar", "training_bar"):
                    if isinstance(callback, ProgressCallback) and (open_bar := getattr(callback, bar)):
                        open_bar.close()

    def train_from(self, checkpoint: Path | None, overwrite: bool, **kwargs: Any) -> TrainOutput:
        """Train from a checkpoint, or from the start; a training that has ended there is only loaded.

        overwrite: delete what an earlier training left in the output directory, see `check_output`.

        Returns:
            transformers' `TrainOutput`; its loss is NaN where no step was left.
        """
        if overwrite and self.args.should_save:
            remove_training(Path(self.args.output_dir))
        done = None if checkpoint is None else finished(checkpoint, self.args)
        if checkpoint is not None and done is not None:
            self.take_up(done, checkpoint)
            return TrainOutput(done.global_step, math.nan, {})
        return CacheTrainer.train(self, resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own, of checkpoints and of the finished student; StudentError for weights of NaNs."""
        check_weights(self.model, self.state.global_step)
        if is_sharded(self.model):
            self._whole = whole_state(self.model, self.args.should_save)
        super().save_model(output_dir, _internal_call)
        self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if has_adapters(self.model.student):
            save_adapters(self.model.student, directory, self._tokenizer_dir)
        else:
            state = _below("student.", self._whole)
            save_student(self.model.student, directory, self._tokenizer_dir, state, self._stops)
        if directory != Path(self.args.output_dir):  # a checkpoint, not the finished student
            self.model.projectors.save(directory, _below("projectors.", self._whole))
            if self._balance is not None:
                self._balance.save(directory)
        torch.save(without_secrets(self.args), directory / "training_args.bin")
        teachers = [weight.to_json() for weight in self.model.objective.teachers]
        record = {
            **self.train_dataset.record(),
            **({"teacher_weights": teachers} if len(teachers) > 1 else {}),
            "order": ORDER_VERSION,
            "seed": order_seed(self.args),
            "samples": len(self.train_dataset),
            "global_batch": self.get_total_train_batch_size(self.args),
        }
        write_json(directory / MANIFEST_FILE, record)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own; of a sharded model in the same files and form, so that any number of processes can
        resume from them, sharded or not.
        """
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather(self.optimizer.state_dict(), self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's own, which puts the whole state on each GPU; of a sharded model only this one's part."""
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        whole = torch.load(
            Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True
        )
        self.optimizer.load_state_dict(shard_optimizer_state(self.optimizer, whole))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = load_adapters if has_adapters(self.model.student) else load_weights
        load(self.model.student, Path(resume_from_checkpoint))
        self.model.projectors.load(Path(resume_from_checkpoint))
        if self._balance is not None:
            self._balance.load(Path(resume_from_checkpoint))

    def take_up(self, state: TrainerState, checkpoint: Path) -> None:
        """Load the state in which a finished training has ended; `train` would take one more step."""
        self._load_from_checkpoint(str(checkpoint))
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        weights = self.model.objective.weights_at((state.global_step - 1) / max(state.max_steps, 1))
        self.model.weights = weights if self._balance is None else self._balance.weights(weights)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _below(prefix: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Of a module by this name, out of the state of the one around it."""
    if state is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _rounding(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    betas = (args.adam_beta1, args.adam_beta2)
    return RoundingAdamW, {
        "lr": args.learning_rate,
        "betas": betas,
        "eps": args.adam_epsilon,
        "seed": args.seed,
    }


def held_out_metrics(document_G: Sequence[int], prediction: EvalPrediction) -> dict[str, float]:
    """Means per learned position over the held-out samples.

    loss: the objective. kl: KL(teacher || student), coarse-grained (a lower bound, see
    losses.sparse.forward_kl), nats. ce: nats per token, and perplexity = exp(ce). top1_agreement: share of
    positions where both prefer the same token. teacher_perplexity: of the teacher on the same tokens. The
    teacher's columns need a cached `logits` group, its perplexity one that is not partial. kl_se: standard
    error of kl over documents, see `cluster_error`.

    Of a student with another tokenizer ce is per token of its own, and kl and top1_agreement are over the
    positions at which its teacher has a distribution. Then bits_per_byte is that of the learned text, and
    teacher_bits_per_byte the teacher's of the same text; these compare across tokenizers.

    document_G: the number of each sample's document, see `split.number_documents`.
    """
    by_sample = np.asarray(prediction.predictions, np.float64)
    translated = by_sample.shape[1] > len(EVAL_COLUMNS)
    names = (*EVAL_COLUMNS, *BYTE_COLUMNS) if translated else EVAL_COLUMNS
    sums = dict(zip(names, by_sample.sum(0), strict=True))
    count, known = max(sums["positions"], 1.0), sums["kl_positions"]
    metrics = {
        "loss": sums["loss"] / count,
        "ce": sums["ce"] / count,
        "perplexity": perplexity(sums["ce"] / count),
    }
    if known:
        metrics |= {
            "kl": sums["kl"] / known,
            "top1_agreement": sums["top1_agreement"] / known,
        }
        columns = (by_sample[:, EVAL_COLUMNS.index(name)] for name in ("kl", "kl_positions"))
        kl_D, known_D = (np.bincount(document_G, column_G) for column_G in columns)
        if (error := cluster_error(kl_D, known_D)) is not None:
            metrics["kl_se"] = error
        # NaN when the cache does not know it of every label, as one that was imported.
        if math.isfinite(sums["teacher_nll"]) and not translated:
            metrics["teacher_perplexity"] = perplexity(sums["teacher_nll"] / known)
    if translated:
        nats = {"bits_per_byte": (sums["ce"], sums["bytes"])}
        nats["teacher_bits_per_byte"] = (sums["teacher_nll"], sums["teacher_bytes"])
        metrics |= {
            name: total / math.log(2) / length
            for name, (total, length) in nats.items()
            if length and math.isfinite(total)
        }
    return {name: float(value) for name, value in metrics.items()}
