"""Recipes: flags of `from-cache` in a YAML file, perhaps of several trainings that follow each other.

    student-model-as-bitnet: true        # flags, without dashes in front
    objective: {terms: [{loss: kl}]}     # or a path, relative to the recipe
    stages:
      - {name: pretrain, share: 0.3, logits-loss: none, ce-weight: 1}
      - {name: distil, share: 0.7}

A stage has the flags above `stages`, then its own, then those of the command line, of which the later win. It
starts from the student of the stage before.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from student.config.flagfile import command_line
from student.config.parser import Request, make_parser, parse, unknown_word
from student.errors import UserError
from student.yamlfile import read_yaml

_NAME = re.compile(r"(?!checkpoint-)[A-Za-z0-9][A-Za-z0-9_-]*")
_COMMAND_LINE_ONLY = (
    "recipe",
    "output_dir",
    "json",
    "quiet",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "help",
)
_OF_ALL_STAGES = ("max_steps", "num_train_epochs")
_OF_FIRST_STAGE = (
    *("student", "student_model_config", "student_tokenizer", "init", "copy_layers", "teacher"),
)


@dataclass(frozen=True)
class Stage:
    """One entry of `stages`. share: of all steps."""

    name: str
    share: float
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a file says: flags of all stages, and the stages; none where it is one training."""

    flags: Mapping[str, Any]
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class StageRequest:
    """One training of a recipe."""

    name: str
    request: Request


def take_recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """(value of --recipe, the other words)."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    found, rest = parser.parse_known_args(list(argv))
    return found.recipe, rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; give --recipe FILE.yaml")


def requests(path: str, argv: Sequence[str]) -> Request | list[StageRequest]:
    """What the recipe at `path` and the other words of the command line ask for; a list where it has stages.

    UserError for whatever is wrong in the file or in the words.
    """
    where = f"--recipe {path}"
    recipe = parse_recipe(read_yaml(path, where, "a YAML file of flags"), where, Path(path).parent)
    common = _words(recipe.flags, where)
    if not recipe.stages:
        return parse([*common, *argv])
    stages = []
    for stage in recipe.stages:
        place = f"{where}: stage {stage.name}"
        try:
            stages.append(parse([*common, *_words(stage.flags, place), *argv]))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return _chained(recipe.stages, stages)


def _chained(stages: Sequence[Stage], parsed: Sequence[Request]) -> list[StageRequest]:
    """Requests of which each starts where the one before saves, with its share of the steps. The last one
    saves into --output-dir itself.
    """
    training = parsed[0].training
    if training.resume_from_checkpoint is not None:
        raise UserError(
            "--resume-from-checkpoint: a recipe with stages resumes by itself when its command is run again; "
            "leave the flag out"
        )
    base = Path(training.output_dir)
    folders = [base / stage.name for stage in stages[:-1]] + [base]
    steps = share_steps(training.max_steps, stages) if training.max_steps > 0 else [-1] * len(stages)
    chained: list[StageRequest] = []
    for index, (stage, request) in enumerate(zip(stages, parsed, strict=True)):
        options, args = request.options, request.training
        if index:
            options = replace(
                options,
                student=str(folders[index - 1]),
                student_model_config=None,
                student_tokenizer=None,
            )
        args.output_dir, args.max_steps = str(folders[index]), steps[index]
        args.num_train_epochs *= stage.share
        chained.append(StageRequest(stage.name, replace(request, options=options)))
    return chained


def share_steps(total: int, stages: Sequence[Stage]) -> list[int]:
    """Steps of each stage, `total` together; UserError where one would have none."""
    ends = [round(total * math.fsum(stage.share for stage in stages[: i + 1])) for i in range(len(stages))]
    steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for stage, count in zip(stages, steps, strict=True):
        if count < 1:
            raise UserError(f"--max-steps {total} leaves no step to the stage {stage.name}; give more")
    return steps


def parse_recipe(value: object, where: str, folder: Path) -> Recipe:
    """The recipe that a parsed file in `folder` makes; UserError for whatever is wrong in it."""
    example = "write e.g. `student-model-as-bitnet: true`"
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: needs a mapping of flags; {example}")
    flags = _flags({name: given for name, given in value.items() if name != "stages"}, where, folder)
    if "stages" not in value:
        return Recipe(flags)
    listed = value["stages"]
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"{where}: stages must be a list of at least one, e.g. `- {{name: distil, share: 1}}`"
        )
    shares = _shares(listed, where)
    stages: list[Stage] = []
    for index, (entry, share) in enumerate(zip(listed, shares, strict=True)):
        name = _name(entry, f"{where}: stages[{index}]", [stage.name for stage in stages])
        place = f"{where}: stage {name}"
        own = _flags({k: v for k, v in entry.items() if k not in ("name", "share")}, place, folder)
        _refuse(
            own, _OF_ALL_STAGES, place, "counts the steps of all stages together; write a `share` of them"
        )
        if index:
            _refuse(
                own, _OF_FIRST_STAGE, place, "is of the first stage; later ones start from the student before"
            )
        stages.append(Stage(name, share, own))
    return Recipe(flags, tuple(stages))


def _flags(flags: Mapping[Any, Any], where: str, folder: Path) -> dict[str, Any]:
    """Checked names, with underscores; the path of an objective is no longer relative to `folder`."""
    command_line(flags, where)  # refuses what is no flag whatever its name
    parser, named = make_parser(), {}
    for name, value in flags.items():
        if f"--{name.replace('-', '_')}" not in parser._option_string_actions:
            raise UserError(f"{where}: {unknown_word(parser, '--' + name)}")
        named[name.replace("-", "_")] = value
    _refuse(named, _COMMAND_LINE_ONLY, where, "is of the command line; leave it out of the recipe")
    if isinstance(named.get("objective"), str):
        named["objective"] = str(folder / named["objective"])
    return named


def _refuse(flags: Iterable[str], names: Sequence[str], where: str, reason: str) -> None:
    for name in flags:
        if name in names:
            raise UserError(f"{where}: {name.replace('_', '-')} {reason}")


def _name(entry: object, where: str, taken: Sequence[str]) -> str:
    if not isinstance(entry, dict) or "name" not in entry:
        raise UserError(f"{where} must be a mapping with a key `name`, e.g. {{name: distil, share: 0.7}}")
    name = entry["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: a stage is named by letters, digits, - and _, since its folder is called so, and not "
            f"checkpoint-…; not {name!r}"
        )
    if name in taken:
        raise UserError(f"{where}: there is a stage {name} already; name it otherwise")
    return name


def _shares(stages: Sequence[Any], where: str) -> list[float]:
    """Of each stage; even ones where none is given."""
    given = [stage.get("share") if isinstance(stage, dict) else None for stage in stages]
    if all(share is None for share in given):
        return [1 / len(stages)] * len(stages)
    numbers = [
        share
        for share in given
        if isinstance(share, (int, float)) and not isinstance(share, bool) and share > 0
    ]
    if len(numbers) < len(given) or not math.isclose(math.fsum(numbers), 1.0, abs_tol=1e-6):
        raise UserError(
            f"{where}: `share` is the part of all steps that a stage has: give each one above 0, 1 in all, "
            "or leave them all out for even ones"
        )
    return numbers


def _words(flags: Mapping[str, Any], where: str) -> list[str]:
    """Of a command line, each flag joined with its value, so that none takes the word that follows."""
    words = command_line(flags, where)
    return [f"{flag}={value}" for flag, value in zip(words[::2], words[1::2], strict=True)]
