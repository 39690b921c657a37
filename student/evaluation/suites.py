"""Named sets of tasks and texts: suites.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from student.errors import UserError
from student.evaluation.request import TextOptions
from student.evaluation.texts import TextSource
from student.losses.catalogue import suggest


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parent / "suites.yaml").read_text(encoding="utf-8")
    )
    return found


def suite_members(names: tuple[str, ...], kind: str) -> list[tuple[str, str]]:
    """(suite, member) of every suite's `tasks` or `texts`; UserError for a suite that is not there."""
    suites = _file()["suites"]
    for name in names:
        if name not in suites:
            raise UserError(
                f"--suite {name} is unknown{suggest(name, suites)}; there are {', '.join(suites)}"
            )
    return [(name, member) for name in names for member in suites[name].get(kind, [])]


def text_sources(options: TextOptions, suites: tuple[str, ...]) -> list[TextSource]:
    """The texts of --text and --suite, each once."""
    names = [*options.names, *(member for _, member in suite_members(suites, "texts"))]
    sources = [_source(name, options) for name in dict.fromkeys(names)]
    if options.split and sources and all(Path(source.source).expanduser().is_file() for source in sources):
        raise UserError(f"--split {options.split}: no data set of the hub is in --text; leave it out")
    return sources


def _source(name: str, options: TextOptions) -> TextSource:
    known = _file()["texts"].get(name, {"source": name})
    return TextSource(
        name=name,
        source=known["source"],
        split=options.split or known.get("split", "train"),
        column=options.column or known.get("column"),
        since=options.since,
        date_column=options.date_column,
    )
