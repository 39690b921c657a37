"""The trainings of a recipe with stages, one after the other; what is done is not done again.

A stage's folder holds stage.json: the manifest of the cache that it reads, its flags, whether it is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distily.logs import LOG
from distily.safety.parsing import read_json
from distily.system.files import write_json
from featurestore.errors import BAD_REQUESTS
from student.config.parser import Request
from student.config.recipes import StageRequest
from student.errors import UserError
from student.modeling.plan import StudentPlan
from student.training.outputs import check_output, check_writable, remove_training
from student.training.resume import last_checkpoint
from student.training.run import build, prepare, train

RECORD = "stage.json"
_ELSEWHERE = (
    "json",
    "quiet",
    "overwrite_output_dir",
    "manifest",
    "student",
)  # flags that do not say what a stage learns
_HOW_LONG = ("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "weight_decay", "seed")


def train_stages(stages: Sequence[StageRequest]) -> dict[str, Any]:
    """Train the stages that are not finished, one after the other.

    All stages read the cache as it was when the first one began. A stage that was killed resumes from its
    last checkpoint.

    Returns:
        The summary of the last stage; {} in processes other than the first.

    Raises:
        UserError: a stage cannot be trained as asked. Every stage is checked before any training begins.
    """
    # 1. Find out which stages are finished.
    overwrite = stages[0].request.options.overwrite_output_dir
    records: list[dict[str, Any]] = [{} if overwrite else _record(stage) for stage in stages]
    done = next((i for i, record in enumerate(records) if not record.get("finished")), len(stages))
    for stage, record in zip(stages[:done], records, strict=False):
        _tell(stage.request, f"stage {stage.name}: finished before{_changes(stage, record)}")
    if done == len(stages):
        if any(map(_changes, stages, records)):
            raise UserError(
                f"--output-dir {_folder(stages[-1])}: all its stages were finished with other flags; give "
                "another one"
            )
        return _load(_folder(stages[-1]) / "summary.json") if _first(stages[-1].request) else {}
    # 2. Check the others, each on the plan of the one before it, before anything is trained.
    manifest = records[0].get("manifest")
    before: StudentPlan | None = None
    for stage, record in zip(stages[done:], records[done:], strict=True):
        with _named(stage):
            stage.request.options.manifest = manifest or stage.request.options.manifest
            _go_on(stage, record)
            prepared = prepare(stage.request, before)
            check_writable(_folder(stage))
        before, manifest = prepared.plan, ",".join(prepared.stores.manifests)
        stage.request.options.manifest = manifest
    # 3. Train them.
    summary: dict[str, Any] = {}
    for number, stage in enumerate(stages[done:], done + 1):
        _tell(stage.request, f"stage {stage.name}: {number} of {len(stages)}, in {_folder(stage)}")
        if overwrite and stage.request.training.should_save:
            remove_training(_folder(stage))
        stage.request.options.overwrite_output_dir = False  # done, and the record that follows is to stay
        _keep(stage, finished=False)
        with _named(stage):
            summary = train(build(prepare(stage.request)))
        _keep(stage, finished=True)
    return summary


def _go_on(stage: StageRequest, record: dict[str, Any]) -> None:
    """Resume from the stage's last checkpoint, if this recipe wrote it; refuse to touch another training."""
    if record.get("finished") is not False:
        check_output(stage.request)
        return
    checkpoint = last_checkpoint(_folder(stage))
    if checkpoint is not None:
        stage.request.training.resume_from_checkpoint = str(checkpoint)


def _keep(stage: StageRequest, finished: bool) -> None:
    """Write the record; all processes wait until it is there, and what was saved before it."""
    args, path = stage.request.training, _folder(stage) / RECORD
    if _first(stage.request):
        record = {
            "stage": stage.name,
            "manifest": stage.request.options.manifest,
            "flags": _flags(stage.request),
            "finished": finished,
        }
        write_json(path, record)
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()


def _record(stage: StageRequest) -> dict[str, Any]:
    try:
        return _load(_folder(stage) / RECORD)
    except FileNotFoundError:
        return {}


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise UserError(
            f"--output-dir: {path} is damaged ({error}); remove it, or take another one"
        ) from error
    return loaded


def _flags(request: Request) -> dict[str, str]:
    """What was asked of a stage, as far as it says what is learned and for how long."""
    options = {name: str(value) for name, value in vars(request.options).items() if name not in _ELSEWHERE}
    return options | {name: str(getattr(request.training, name)) for name in _HOW_LONG}


def _changes(stage: StageRequest, record: dict[str, Any]) -> str:
    """How a finished stage was asked for otherwise, in words; empty where it was not."""
    was, now = record.get("flags", {}), _flags(stage.request)
    changed = [f"--{name.replace('_', '-')} {was.get(name)}" for name in now if was.get(name) != now[name]]
    return f", with {', '.join(changed)}" if changed else ""


def _folder(stage: StageRequest) -> Path:
    return Path(stage.request.training.output_dir)


def _first(request: Request) -> bool:
    first: bool = request.training.process_index == 0
    return first


def _tell(request: Request, line: str) -> None:
    if _first(request):
        LOG.info(line)


@contextmanager
def _named(stage: StageRequest) -> Iterator[None]:
    """Bad requests name the stage."""
    try:
        yield
    except (UserError, *BAD_REQUESTS) as error:
        raise UserError(f"stage {stage.name}: {error}") from error
