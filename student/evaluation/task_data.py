"""Tasks whose records lie in local files: DIR/<data set>/[<config>/]<split>.jsonl or .parquet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distily.datafiles import digest_of
from student.errors import UserError

_BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
# Where the harness looks for examples, first to last.
_SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")


def leaves(index: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
    """The tasks that names of tasks, tags and groups of the harness's index stand for."""
    for name in names:
        entry = index[name]
        kind = entry.kind.name.lower()
        if kind == "tag":
            yield from leaves(index, sorted(entry.tags))
        elif kind == "group":
            yield from leaves(index, (member for member in _members(config_of(entry)) if member in index))
        else:
            yield name


def config_of(entry: Any) -> dict[str, Any]:
    """What a task's or group's file says, its includes as well; no code of a task is imported for it."""
    return dict(entry.cfg or {})


def local(entry: Any, data: Path, shots: int | None, overrides: Path) -> Any:
    """The entry of a task that reads its records under `data`; UserError where the files are not there.

    Its file lies in `overrides` and includes the task's own, so that nothing but the data differs: splits
    that are not used may be absent. shots: examples in front of a record, None: the task's own number.
    """
    name, config = entry.name, config_of(entry)
    if "dataset_path" not in config:
        raise UserError(f"--task-data: {name} loads its records with code of its own; leave this task out")
    folder = data / config["dataset_path"] / (config.get("dataset_name") or "")
    files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in _BUILDERS}
    needed = _used_splits(config, config.get("num_fewshot") if shots is None else shots)
    missing = [split for split in needed if split not in files]
    if missing or len({file.suffix for file in files.values()}) != 1:
        split = (missing or needed)[0]
        raise UserError(f"--task-data: {name} needs {folder / split}.jsonl (or all splits as .parquet)")
    override = {
        "include": str(entry.yaml_path),
        "dataset_path": _BUILDERS[next(iter(files.values())).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(_by_content(file)) for split, file in files.items()}},
    } | {key: None for key in _SPLITS if config.get(key) not in files}
    file = overrides / f"{name}.yaml"
    file.write_text(yaml.safe_dump(override), encoding="utf-8")
    return replace(entry, yaml_path=file)


def _by_content(file: Path) -> Path:
    """A link to a file, called by its content.

    The harness loads it with `datasets`, which takes names for patterns, and goes by the time of a file to
    see whether it has changed.
    """
    import datasets

    link = Path(datasets.config.HF_DATASETS_CACHE) / "distily-train" / f"{digest_of(file)}{file.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f"{os.getpid()}-{link.name}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(file.resolve())
    return beside.replace(link)


def _used_splits(config: dict[str, Any], shots: int | None) -> list[str]:
    """The split that is evaluated, and the one that examples come from, in the harness's order."""
    by_key = {key: config[key] for key in _SPLITS if config.get(key)}
    evaluated = by_key.get("test_split") or by_key.get("validation_split") or "test"
    own_examples = "samples" in (config.get("fewshot_config") or {})
    if not shots or own_examples:
        return [evaluated]
    return [evaluated, next(iter(by_key.values()), evaluated)]


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Names in a group's list, and in the groups that are written out inside it."""
    members = config.get("task", [])
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), list):
            yield from _members(member)
        else:
            yield member.get("task") or member["group"]
