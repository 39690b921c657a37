"""Tasks of lm-evaluation-harness, through its own API, on a model that is loaded already."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distily.text import one_line
from student.errors import UserError
from student.evaluation.models import Side
from student.evaluation.request import EvalRequest, TaskOptions
from student.evaluation.suites import suite_members
from student.evaluation.task_data import config_of, leaves, local
from student.losses.catalogue import suggest

OWN_TASKS = Path(__file__).parent / "tasks"
_DEFAULT_GEN_TOKS = 256  # the harness's
_BOOTSTRAP = 200  # for standard errors of metrics that are no means


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """tasks: the harness's objects with their records. names: what was asked for, by leaf task. datasets: by
    leaf task. suites: by what was asked for.
    """

    manager: Any
    tasks: list[Any]
    names: dict[str, str]
    datasets: dict[str, str]
    suites: dict[str, str]
    options: TaskOptions


def load_tasks(request: EvalRequest, sides: Sequence[Side]) -> LoadedTasks | None:
    """The tasks of --tasks and --suite with their records; None when there are none.

    UserError for an unknown task, one that runs code that models write, one whose records are not to be had,
    and one that generates more tokens than a model takes.
    """
    suites = {member: suite for suite, member in suite_members(tuple(request.suites), "tasks")}
    names = list(dict.fromkeys([*request.tasks.names, *suites]))
    if not names:
        return None
    require("lm_eval", "--tasks")
    manager = task_manager()
    index = manager.task_index
    for name in names:
        if name not in index:
            raise UserError(f"--tasks {name} is unknown{suggest(name, index)}")
    asked: dict[str, str] = {}
    for name in names:
        asked |= {leaf: name for leaf in leaves(index, [name]) if leaf not in asked}
    datasets = {leaf: _dataset(index, leaf) for leaf in asked}
    with _local_records(index, list(asked), request.tasks):
        tasks = [task for name in names for task in _load(manager, name)]
    loaded = LoadedTasks(
        manager=manager, tasks=tasks, names=asked, datasets=datasets, suites=suites, options=request.tasks
    )
    _check_lengths(loaded, sides)
    return loaded


@cache
def task_manager() -> Any:
    """The harness's index of its tasks and of ours; made once, since it reads thousands of files."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(OWN_TASKS))


@contextmanager
def _local_records(index: dict[str, Any], names: Sequence[str], options: TaskOptions) -> Iterator[None]:
    """Tasks that are loaded meanwhile read the files of --task-data, where that is given."""
    if options.data is None:
        yield
        return
    own = {name: index[name] for name in names}
    with tempfile.TemporaryDirectory() as overrides:
        try:
            for name, entry in own.items():
                index[name] = local(entry, options.data, options.num_fewshot, Path(overrides))
            yield
        finally:
            index.update(own)


def require(package: str, flag: str) -> None:
    """UserError where a package of the extra [eval] is not installed."""
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(f"{flag} needs the package {name}; install the extra [eval], or pip install {name}")


def language_model(model: Any, side: Side, batch_size: int) -> Any:
    """The harness's view of a model in memory."""
    from lm_eval.models.huggingface import HFLM

    length = side.positions
    return HFLM(
        pretrained=model, tokenizer=side.tokenizer, backend="causal", batch_size=batch_size, max_length=length
    )


def vllm_model(side: Side, batch_size: int) -> Any:
    """The same model in vLLM."""
    from lm_eval.api.registry import get_model

    arguments = {"pretrained": side.source, "max_model_len": side.positions, "batch_size": batch_size}
    return get_model("vllm")(**arguments)


def run(model: Any, loaded: LoadedTasks, limit: int | None) -> list[dict[str, Any]]:
    """One entry for each metric of each task and group: {task, dataset, metric, filter, samples, value,
    stderr}.
    """
    import lm_eval

    options = loaded.options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "F-score is ill-defined")  # in a resampling without positives
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=loaded.tasks,
            task_manager=loaded.manager,
            num_fewshot=options.num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            gen_kwargs={"max_gen_toks": options.max_gen_toks} if options.max_gen_toks else None,
        )
    entries = []
    for task, values in (results["results"] | results.get("groups", {})).items():
        members = _leaves_of(task, results.get("group_subtasks", {}))
        samples = sum(results["n-samples"][leaf]["effective"] for leaf in members)
        where = {"task": task, "dataset": ", ".join(dict.fromkeys(loaded.datasets[m] for m in members))}
        entries += [where | {"samples": samples} | entry for entry in _entries(values)]
    return entries


def _entries(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of one task, which the harness names `metric,filter` and `metric_stderr,filter`."""
    entries = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, (int, float)) else None
            entries.append({"metric": metric, "filter": chosen, "value": float(value), "stderr": error})
    return entries


def _leaves_of(name: str, groups: dict[str, list[str]]) -> list[str]:
    members = groups.get(name) or []
    return [leaf for member in members for leaf in _leaves_of(member, groups)] if members else [name]


def _dataset(index: dict[str, Any], leaf: str) -> str:
    """Name of a task's data set; UserError for a task that is not offered."""
    config = config_of(index[leaf])
    if config.get("unsafe_code"):
        raise UserError(f"--tasks {leaf}: it runs code that a model wrote, which is not offered")
    return ":".join(filter(None, (config.get("dataset_path", leaf), config.get("dataset_name"))))


def _load(manager: Any, name: str) -> list[Any]:
    """Tasks, or groups that hold theirs, with their records."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        found = manager.load(name)
    except UserError:
        raise
    except Exception as error:  # data sets and tasks raise whatever their libraries do
        reason = one_line(error.__cause__ or error, None)
        raise UserError(f"--tasks {name}: it cannot be loaded ({reason})") from error
    groups, children = found.get("groups", {}), found.get("group_map", {})
    inner = {member for members in children.values() for member in members}
    tops = [*groups.values(), *found["tasks"].values()]
    return [one for one, key in zip(tops, [*groups, *found["tasks"]], strict=True) if key not in inner]


def _check_lengths(loaded: LoadedTasks, sides: Sequence[Side]) -> None:
    limit = min((side.positions for side in sides if side.positions is not None), default=None)
    if limit is None:
        return
    for top in loaded.tasks:
        for task in top.get_all_tasks() if hasattr(top, "get_all_tasks") else [top]:
            if task.OUTPUT_TYPE != "generate_until":
                continue
            given = task.config.generation_kwargs or {}
            tokens = loaded.options.max_gen_toks or given.get("max_gen_toks", _DEFAULT_GEN_TOKS)
            if tokens >= limit:
                raise UserError(
                    f"--tasks {task.config.task}: it generates up to {tokens} tokens, a model takes {limit} "
                    "in all; give a smaller --max-gen-toks"
                )
