"""Tasks whose records lie in local files: DIR/<data set>/[<config>/]<split>.jsonl or .parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from student.errors import UserError

_BUILDERS = {".jsonl": "json", ".parquet": "parquet"}


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


def use_local(index: dict[str, Any], name: str, data: Path, overrides: Path) -> None:
    """Let a task of the index read its records under `data`; UserError where the files are not there.

    The task's file is replaced by one in `overrides` that includes it, so that nothing but the data differs.
    """
    config = config_of(index[name])
    if "dataset_path" not in config:
        raise UserError(f"--task-data: {name} loads its records with code of its own; leave this task out")
    folder = data / config["dataset_path"] / (config.get("dataset_name") or "")
    files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in _BUILDERS}
    needed = [config.get("test_split") or config.get("validation_split")]
    if config.get("num_fewshot"):
        needed.append(config.get("fewshot_split"))
    missing = [split for split in needed if split and split not in files]
    if missing or len({file.suffix for file in files.values()}) != 1:
        split = missing[0] if missing else needed[0]
        raise UserError(f"--task-data: {name} needs {folder / str(split)}.jsonl (or all splits as .parquet)")
    override = {
        "include": str(index[name].yaml_path),
        "dataset_path": _BUILDERS[next(iter(files.values())).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in files.items()}},
    }
    index[name].yaml_path = overrides / f"{name}.yaml"
    index[name].yaml_path.write_text(yaml.safe_dump(override), encoding="utf-8")


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
