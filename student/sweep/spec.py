"""What a sweep's YAML file says, checked as far as that goes without a cache. Pure but for `read`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from student.errors import UserError
from student.losses.catalogue import suggest
from student.yamlfile import read_yaml

Flags = Mapping[str, Any]

# Metrics of the held-out samples, and which way is better.
METRICS: dict[str, Literal["minimize", "maximize"]] = {
    "eval_kl": "minimize",
    "eval_ce": "minimize",
    "eval_perplexity": "minimize",
    "eval_top1_agreement": "maximize",
    "eval_loss": "minimize",
    "eval_bits_per_byte": "minimize",
}
RESERVED = (
    "output-dir",
    "json",
    "quiet",
    "resume-from-checkpoint",
    "store",
    "help",
)  # the sweep's own business
SEED = "seed"
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")  # a number, which YAML takes for text


@dataclass(frozen=True)
class SweepAxis:
    """One thing that is varied: the flags that each choice sets, by the choice's label."""

    name: str
    choices: Mapping[str, Flags]


@dataclass(frozen=True)
class Range:
    """A flag whose value is searched between two numbers, both included; whole ones when both are."""

    name: str
    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Search:
    """A search by Optuna's TPE sampler; seed: of the sampler."""

    space: tuple[SweepAxis | Range, ...]
    trials: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """base: flags of all runs. grid: all combinations are run, unless there is a search. seeds: each setting
    is trained once with each of them; none: with the default seed. content: the parsed file.
    """

    base: Flags
    grid: tuple[SweepAxis, ...]
    search: Search | None
    seeds: SweepAxis | None
    metric: str
    direction: Literal["minimize", "maximize"]
    content: Mapping[str, Any]

    @property
    def size(self) -> int:
        """How many runs there are to be."""
        settings = self.search.trials if self.search else prod(len(axis.choices) for axis in self.grid)
        return settings * (len(self.seeds.choices) if self.seeds else 1)

    @property
    def axes(self) -> list[str]:
        """Names of all that is varied, the seed last."""
        varied = self.search.space if self.search else self.grid
        return [axis.name for axis in varied] + ([SEED] if self.seeds else [])


def read(path: Path) -> SweepSpec:
    """The specification in a YAML file; UserError, naming the key, for whatever is wrong in it."""
    return parse(read_yaml(str(path), str(path), "a YAML file with a `grid`"), str(path))


def parse(value: object, where: str) -> SweepSpec:
    """The specification that a parsed file makes."""
    content = _mapping(value, where, "`grid: {learning-rate: [1e-3, 2e-3]}`")
    _known(content, ("base", "grid", "search", "seeds", "metric", "direction"), where)
    if ("grid" in content) == ("search" in content):
        raise UserError(f"{where}: needs `grid` or `search`, one of them")
    base = _flags(content.get("base") or {}, f"{where}: base")
    search = _search(content["search"], f"{where}: search") if "search" in content else None
    grid = _axes(content["grid"], f"{where}: grid") if "grid" in content else ()
    seeds = _seeds(content["seeds"], f"{where}: seeds") if "seeds" in content else None
    varied = search.space if search else grid
    _apart([*varied, *([seeds] if seeds else [])], where)
    metric = content.get("metric", "eval_kl")
    if metric not in METRICS:
        raise UserError(f"{where}: metric must be one of {', '.join(METRICS)}, not {metric!r}")
    direction = content.get("direction", METRICS[metric])
    if direction not in ("minimize", "maximize"):
        raise UserError(f"{where}: direction must be minimize or maximize, not {direction!r}")
    return SweepSpec(
        base=base, grid=grid, search=search, seeds=seeds, metric=metric, direction=direction, content=content
    )


def label(value: Any) -> str:
    """A value of a flag in a few characters, for tables and names of runs."""
    if value is None:
        return "default"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={label(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ",".join(map(label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _axes(value: object, where: str) -> tuple[SweepAxis, ...]:
    mapping = _mapping(value, where, "`learning-rate: [1e-3, 2e-3]`")
    return tuple(_axis(_name(name, where), choices, f"{where}: {name}") for name, choices in mapping.items())


def _axis(name: str, value: object, where: str) -> SweepAxis:
    """A list has values of the flag that the axis is named after; a mapping has bundles of flags."""
    if isinstance(value, list) and value:
        _check_reserved(name, where)
        choices = [(label(item), {name: item}) for item in map(_number, value)]
    elif isinstance(value, dict) and value:
        choices = [(str(key), _flags(flags or {}, f"{where}: {key}")) for key, flags in value.items()]
    else:
        raise UserError(f"{where} must be a list of values, or map names to flags, not {value!r}")
    labels = [one for one, _ in choices]
    if twice := [one for one in labels if labels.count(one) > 1]:
        raise UserError(f"{where} has {twice[0]} twice; give each choice once")
    return SweepAxis(name, dict(choices))


def _search(value: object, where: str) -> Search:
    mapping = _mapping(value, where, "`{trials: 20, space: {learning-rate: {low: 1e-4, high: 1e-2}}}`")
    _known(mapping, ("trials", "seed", "space"), where)
    trials, seed = mapping.get("trials"), mapping.get("seed", 0)
    if type(trials) is not int or trials < 1:
        raise UserError(f"{where}: trials must be a whole number of at least 1, not {trials!r}")
    if type(seed) is not int or seed < 0:
        raise UserError(f"{where}: seed must be a whole number of at least 0, not {seed!r}")
    space = _mapping(mapping.get("space"), f"{where}: space", "`learning-rate: {low: 1e-4, high: 1e-2}`")
    found = [_dimension(_name(name, where), one, f"{where}: space: {name}") for name, one in space.items()]
    return Search(tuple(found), trials, seed)


def _dimension(name: str, value: object, where: str) -> SweepAxis | Range:
    example = "`{low: 1e-4, high: 1e-2, log: true}` or `{choices: [...]}`"
    mapping = _mapping(value, where, example)
    if "choices" in mapping:
        _known(mapping, ("choices",), where)
        return _axis(name, mapping["choices"], f"{where}: choices")
    _known(mapping, ("low", "high", "log"), where)
    _check_reserved(name, where)
    low, high, log = _number(mapping.get("low")), _number(mapping.get("high")), mapping.get("log", False)
    if not all(type(bound) in (int, float) for bound in (low, high)) or type(log) is not bool or low > high:
        raise UserError(f"{where}: low and high must be numbers, low first, and log true or false; {example}")
    if log and low <= 0:
        raise UserError(f"{where}: log needs a low above 0, not {low!r}")
    return Range(name, low, high, log)


def _seeds(value: object, where: str) -> SweepAxis:
    if not isinstance(value, list) or not value or any(type(seed) is not int for seed in value):
        raise UserError(f"{where} must be a list of whole numbers, e.g. [0, 1, 2], not {value!r}")
    return _axis(SEED, value, where)


def _apart(axes: Sequence[SweepAxis | Range], where: str) -> None:
    """UserError when two of them set the same flag."""
    owner: dict[str, str] = {}
    for axis in axes:
        flags = {axis.name} if isinstance(axis, Range) else {f for one in axis.choices.values() for f in one}
        for flag in sorted(flags):
            if flag in owner:
                raise UserError(f"{where}: {owner[flag]} and {axis.name} both set {flag}; let one of them")
            owner[flag] = axis.name


def _flags(value: object, where: str) -> dict[str, Any]:
    mapping = _mapping(value, where, "`learning-rate: 1e-3`")
    flags = {_name(name, where): _number(one) for name, one in mapping.items()}
    for name in flags:
        _check_reserved(name, where)
    return flags


def _name(value: object, where: str) -> str:
    """A flag without dashes in front, dashes in it."""
    if not isinstance(value, str) or not value or value.startswith("-"):
        raise UserError(f"{where}: {value!r} is no flag; write its name without dashes in front")
    return value.replace("_", "-")


def _check_reserved(name: str, where: str) -> None:
    if name in RESERVED:
        raise UserError(f"{where}: {name} is set by the sweep itself; leave it out")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _mapping(value: object, where: str, example: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping, e.g. {example}, not {json.dumps(value, default=str)}")
    return value


def _known(mapping: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in known:
            hint = suggest(str(key), known) or f"; known are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
