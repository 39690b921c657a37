"""From which checkpoint a run resumes, and that it resumes with the same samples in the same order.

Which samples a step learns from follows from the manifest, the version of the order, the seed, how many
samples are trained on, and the global batch: MANIFEST_FILE of a checkpoint records them, Trainer's state the
step. The number of processes plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distily.checkpoint.configs import json_object
from distily.safety.parsing import MAX_LOG, read_json
from distily.system.stopping import advise
from featurestore.order import ORDER_VERSION
from student.bitnet.layout import saved_conversion
from student.errors import UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.plan import StudentPlan
from student.modeling.saving import MANIFEST_FILE, saved_config
from student.objective.weights import Weight

_OPTIMIZER = ("optimizer.pt", "optimizer.bin")
_STATE = "trainer_state.json"  # what Trainer writes last into a checkpoint


class KeptCallback(TrainerCallback):  # type: ignore[misc]
    """Has the line of a training that is stopped say what it has kept."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step:
            self.on_save(args, state, control)
        else:
            advise("no checkpoint is saved yet, the training starts again")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        saved = f"step {state.global_step} of {state.max_steps} is saved"
        advise(f"{saved}, --resume-from-checkpoint True resumes there")


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint that `--resume-from-checkpoint` asks for.

    Args:
        args: its `resume_from_checkpoint` is a directory, or "True" for the last whole checkpoint in
            `output_dir`, or "False" or None.

    Returns:
        The checkpoint; None where the training begins from the start.

    Raises:
        UserError: there is no such checkpoint, or steps are left and it has no optimizer state.
    """
    checkpoint = _find(args)
    if checkpoint is None or finished(checkpoint, args):
        return checkpoint
    if not any((checkpoint / name).exists() for name in _OPTIMIZER):
        raise UserError(
            f"--resume-from-checkpoint: {checkpoint} was saved with --save-only-model and has no optimizer "
            f"state to resume with; start from its weights with --student {checkpoint}"
        )
    return checkpoint


def _find(args: TrainingArguments) -> Path | None:
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        if not _whole(Path(asked)):
            raise UserError(f"--resume-from-checkpoint {asked}: not a checkpoint of this trainer; give one")
        return Path(asked)
    last = last_checkpoint(Path(args.output_dir))
    if last is None:
        raise UserError(
            f"--resume-from-checkpoint: no checkpoint in {args.output_dir}; leave the flag out to start anew"
        )
    return last


def last_checkpoint(output_dir: Path) -> Path | None:
    """The last whole checkpoint of a training there."""
    whole = [path for path in output_dir.glob("checkpoint-[0-9]*") if _whole(path)]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def finished(checkpoint: Path, args: TrainingArguments) -> TrainerState | None:
    """The state saved in a checkpoint, if it has reached the end that `args` ask for, else None."""
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    if args.max_steps > 0:
        return state if state.global_step >= args.max_steps else None
    return state if (state.epoch or 0.0) >= args.num_train_epochs else None


def _whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the file that Trainer writes last can be read."""
    try:
        read_json(checkpoint / _STATE, MAX_LOG)
    except (OSError, ValueError):
        return False
    return True


def _check_manifest(manifest: str | None, digest: str, checkpoint: Path | None) -> None:
    if manifest and not digest.startswith(manifest):
        raise UserError(
            f"--manifest {manifest}: {checkpoint} was trained on manifest {digest}; leave the flag out to go "
            "on with it"
        )


def manifests_to_read(manifest: str | None, checkpoint: Path | None, count: int) -> list[str | None]:
    """The manifest to read of each of `count` caches: that of the checkpoint, however the cache has grown
    since, else that of `manifest`; None for the fullest.

    manifest: a digest or the start of one for each cache, with commas between; nothing for the fullest.

    Raises:
        UserError: `manifest` is not of so many caches, or the checkpoint is of other manifests or of another
            number of caches.
    """
    given = [None] * count if manifest is None else [part or None for part in manifest.split(",")]
    if len(given) != count:
        raise UserError(
            f"--manifest {manifest}: give one for each of the {count} STOREs, with commas between"
        )
    record = _record(checkpoint)
    if "manifest" not in record:
        return list(given)
    digests = [record["manifest"], *record.get("further_manifests", ())]
    if len(digests) != count:
        raise UserError(
            f"--resume-from-checkpoint: {checkpoint} was trained on {len(digests)} STOREs, and these are "
            f"{count}; give those of that run"
        )
    for one, digest in zip(given, digests, strict=True):
        _check_manifest(one, digest, checkpoint)
    return digests


def check_stores(checkpoint: Path | None, weights: Sequence[Weight]) -> None:
    """UserError where a checkpoint is of a mixture with other weights."""
    was, now = _record(checkpoint).get("teacher_weights"), [weight.to_json() for weight in weights]
    if was is not None and now != was:
        raise UserError(
            f"--teacher-weights: {checkpoint} was trained with {_shares(was)}, and these are "
            f"{_shares(now)}; give those of that run (weights that move are the `teachers` of an --objective)"
        )


def check_curriculum(checkpoint: Path | None, asked: Mapping[str, str]) -> None:
    """UserError where a checkpoint is of a run that learned from other positions, or weighed them otherwise.

    asked: --select and --weight as `Curriculum.record` has them.
    """
    if checkpoint is None:
        return
    record = _record(checkpoint)
    for name in ("select", "weight"):
        was, now = record.get(name), asked.get(name)
        if was != now:
            given = f"--{name} {now}" if now else f"--{name}"
            trained, fix = (f"with --{name} {was}", "give that") if was else ("without it", "leave it out")
            raise UserError(f"{given}: {checkpoint} was trained {trained}; {fix}")


def check_tokenizer(checkpoint: Path | None, reading: Mapping[str, Any]) -> None:
    """UserError where a checkpoint is of a student with another tokenizer. reading: what the data set
    records.
    """
    if checkpoint is None or _record(checkpoint).get("tokenizer") == reading.get("tokenizer"):
        return
    raise UserError(
        f"--student-tokenizer: {checkpoint} was trained with another tokenizer; resume with the flags "
        "that it was started with"
    )


def _shares(weights: Sequence[Any]) -> str:
    """Of `Weight.to_json`."""
    words = (
        "{schedule} {from:g} to {to:g} until {until:g}".format(**one) if isinstance(one, dict) else f"{one:g}"
        for one in weights
    )
    return ",".join(words)


def order_seed(args: TrainingArguments) -> int:
    """The seed of the order in which samples are read."""
    seed: int = args.seed if args.data_seed is None else args.data_seed
    return seed


def check_order(args: TrainingArguments, samples: int, checkpoint: Path | None) -> None:
    """Refuse to resume where the samples that would be skipped are not those that were learned.

    A run that skips nothing (`--ignore-data-skip`) may change what it likes, and with
    `--auto-find-batch-size` Trainer sets the batch size itself.

    Args:
        args: of the run that resumes.
        samples: how many samples it trains on.
        checkpoint: None for a run that does not resume.

    Raises:
        UserError: the version of the order, the seed, the number of samples or the global batch is another;
            the message names the flag.
    """
    if args.ignore_data_skip:
        return
    record = _record(checkpoint)
    if record and record.get("order", 1) != ORDER_VERSION:
        raise UserError(
            f"--resume-from-checkpoint: {checkpoint} reads the samples in an order of version "
            f"{record.get('order', 1)}, and this distily-train in one of version {ORDER_VERSION}; resume it "
            "with the release that wrote it, or add --ignore-data-skip to begin an epoch anew"
        )
    seed = order_seed(args)
    if record.get("seed", seed) != seed:
        flag = "--seed" if args.data_seed is None else "--data-seed"
        raise UserError(
            f"{flag} {seed}: {checkpoint} reads the samples in the order of seed {record['seed']}; give that"
        )
    if record.get("samples", samples) != samples:
        raise UserError(
            f"--eval-fraction: {checkpoint} was trained on {record['samples']} samples, and this leaves "
            f"{samples}; give the fraction of that run, and its --train-samples"
        )
    factors = (args.train_batch_size, args.world_size, args.gradient_accumulation_steps)
    batch = factors[0] * factors[1] * factors[2]
    if not args.auto_find_batch_size and record.get("global_batch", batch) != batch:
        raise UserError(
            f"--per-device-train-batch-size {factors[0]}: {checkpoint} was trained on "
            f"{record['global_batch']} samples per step, and {factors[0]} x {factors[1]} processes x "
            f"{factors[2]} accumulated are {batch}; make them {record['global_batch']}"
        )


def check_kind(checkpoint: Path, plan: StudentPlan) -> None:
    """UserError when a run is resumed as another kind of student; its checkpoints tell which it was."""
    masters = "bf16" if "BF16" in CheckpointTensors(checkpoint).dtypes() else "fp32"
    was = (saved_conversion(saved_config(str(checkpoint))), masters)
    if was != (plan.conversion, plan.masters):
        raise UserError(
            f"--resume-from-checkpoint: this run would resume with {_kind(plan.conversion, plan.masters)}, "
            f"but {checkpoint} is of a run with {_kind(*was)}; resume with the flags that it was started with"
        )


def _kind(conversion: str | None, masters: str) -> str:
    if conversion is None:
        return "full precision"
    return f"--bitnet-conversion {conversion} --bitnet-masters {masters}"


def _record(checkpoint: Path | None) -> dict[str, Any]:
    return {} if checkpoint is None else json_object(checkpoint / MANIFEST_FILE)
