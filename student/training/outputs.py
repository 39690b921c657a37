"""What lies in an --output-dir already: never overwritten unasked, and removed only as far as a training
wrote it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from featurestore.format.tokenizer_files import TOKENIZER_FILES
from student.card.command import CARD, edited
from student.config.parser import Request
from student.errors import UserError
from student.modeling.saving import MANIFEST_FILE
from student.training.resume import find_checkpoint, last_checkpoint

OVERWRITE = "--overwrite-output-dir"
# What says that a directory has a student, a model, or the record of a training.
_PRECIOUS = ("config.json", "summary.json", "trainer_state.json", "stage.json", MANIFEST_FILE)
# What is of the training before and would be wrong beside another student.
_WRITTEN = (
    *_PRECIOUS,
    *TOKENIZER_FILES,
    "generation_config.json",
    "training_args.bin",
    "model*.safetensors",
    "model.safetensors.index.json",
    "report.html",
    "eval.json",
    "eval-samples.json",
    "sweep_run.json",
    "card-*.png",
    "checkpoint-[0-9]*",
)
_STORE = "SPEC.json"


def holds_training(directory: Path) -> bool:
    """Whether something would be lost: a model, or a checkpoint that a training can be resumed from."""
    if any((directory / name).is_file() for name in _PRECIOUS) or any(directory.glob("model*.safetensors")):
        return True
    return last_checkpoint(directory) is not None


def check_output(request: Request) -> None:
    """UserError where the training would overwrite what lies in its output directory."""
    options, out = request.options, Path(request.training.output_dir)
    overwrite, checkpoint = options.overwrite_output_dir, find_checkpoint(request.training)
    cache = next((place for place in (out, *out.resolve().parents) if (place / _STORE).is_file()), None)
    if cache is not None:
        what = "is a cache" if cache == out else f"lies in the cache {cache}"
        raise UserError(f"--output-dir {out} {what}; give the student a directory of its own")
    inside = checkpoint is not None and out.resolve() in checkpoint.resolve().parents
    if inside and overwrite:
        raise UserError(
            f"{OVERWRITE} would delete what --resume-from-checkpoint resumes from ({checkpoint}); leave one "
            "of them out"
        )
    if inside or not holds_training(out):
        return
    if not overwrite:
        raise UserError(
            f"--output-dir {out} holds a model or a training already; choose another directory, continue "
            f"that training with --resume-from-checkpoint True, or give {OVERWRITE} to lose it"
        )
    if not _ours(out):
        raise UserError(
            f"{OVERWRITE}: what lies in {out} was not written by `distily-train`, so it is not a training to "
            "overwrite; choose another --output-dir"
        )
    for flag, source in {"--student": options.student, "--teacher": options.teacher}.items():
        if source is not None and _lost(Path(source), out):
            raise UserError(f"{OVERWRITE} would delete {flag} {source}; choose another --output-dir")


def remove_training(directory: Path) -> None:
    """Delete what a training wrote. A card that was edited, files that are not its own and the logs of
    TensorBoard stay.
    """
    for pattern in _WRITTEN:
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    if (directory / CARD).is_file() and not edited(directory / CARD):
        (directory / CARD).unlink()


def check_writable(output_dir: Path) -> None:
    """Make the directory; UserError where nothing can be written there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--output-dir {output_dir} cannot be written ({error.strerror}); choose another directory"
        ) from error


def _lost(source: Path, out: Path) -> bool:
    """Whether `source` is among what `remove_training(out)` deletes."""
    source, out = source.resolve(), out.resolve()
    return source == out or any(parent in source.parents for parent in out.glob("checkpoint-[0-9]*"))


def _ours(directory: Path) -> bool:
    """Whether a training of ours was begun there."""
    signs = (MANIFEST_FILE, "stage.json", "sweep_run.json", f"checkpoint-*/{MANIFEST_FILE}")
    return any(any(directory.glob(sign)) for sign in signs)
