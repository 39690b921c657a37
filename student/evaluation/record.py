"""eval.json: what all evaluations of a student have found; a later one replaces what it measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distily.safety.parsing import read_json
from distily.system.files import write_json

VERSION = 1
FILE = "eval.json"
Section = dict[str, Any]


def read_record(directory: Path) -> Section:
    """What is recorded so far; empty where there is nothing, or of another version."""
    try:
        found: Section = read_json(directory / FILE)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("version") == VERSION else {}


def merged(old: Section, new: Section) -> Section:
    """`new` with what `old` has beside: a text is replaced by the one of its name, a metric of a task by the
    same, held-out samples of the cache, trained ones and prompts as a whole. Nothing is kept of other
    weights; of another teacher no figure is.
    """
    if old.get("weights") != new["weights"]:
        old = {}
    teacher = new["teacher"] or old.get("teacher")
    changed = old.get("teacher") not in (None, teacher)
    texts, tasks = old.get("texts", []), old.get("tasks", [])
    if changed:
        texts = [text | {"teacher": None} for text in texts]
        tasks = [task | {"teacher": None, "teacher_stderr": None} for task in tasks]
    prompts = old.get("prompts")
    if prompts and changed:
        prompts = prompts | {"teacher": None}
    return new | {
        "teacher": teacher,
        "teacher_dtype": new["teacher_dtype"] if new["teacher"] else old.get("teacher_dtype"),
        "cache": new["cache"] or old.get("cache"),
        "trained": new["trained"] or old.get("trained"),
        "texts": _replaced(texts, new["texts"], lambda text: text["name"]),
        "tasks": _replaced(tasks, new["tasks"], lambda task: (task["task"], task["metric"], task["filter"])),
        "prompts": new["prompts"] or prompts,
    }


def write_record(directory: Path, record: Section) -> None:
    """All of it or nothing."""
    write_json(directory / FILE, record)


def _replaced(old: list[Section], new: list[Section], key: Callable[[Section], Any]) -> list[Section]:
    fresh = {key(entry) for entry in new}
    return [*(entry for entry in old if key(entry) not in fresh), *new]
