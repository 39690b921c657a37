"""What a field of a request says of its flag: plain data, from which the command line makes the flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import RequestError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of the command line. Its name, type and default are those of the field.

    help: what `--help` says. heading: what it stands under there; None: under none, first. metavar: how its
    value is called there; None: as its type is. choices: the only values. least: the smallest value.
    positional: the value is given alone, without the flag's name. negatable: a switch that has a `--no-...`,
    too. alone: the value of the flag where none follows it; None: one has to follow. parse: makes the value
    of a text, "" where the flag is not given; ValueError says what to give.
    """

    help: str
    heading: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    positional: bool = False
    negatable: bool = False
    alone: str | None = None
    parse: Callable[[str], Any] | None = None


def flag(help_text: str, heading: str | None = None, **more: Any) -> dict[str, Flag]:
    """The metadata of a field that is a flag. `more` are other fields of `Flag`."""
    return {"flag": Flag(help=help_text, heading=heading, **more)}


def flags_of(request: DataclassInstance | type[DataclassInstance]) -> dict[str, Flag]:
    """The flags of a request's fields, by the field's name and in the order of the fields."""
    return {field.name: field.metadata["flag"] for field in fields(request) if "flag" in field.metadata}


def name_of(field: str) -> str:
    """How the flag of a field is written on the command line."""
    return "--" + field.replace("_", "-")


def check_flags(request: DataclassInstance) -> None:
    """RequestError where a value is none of the flag's choices, or below its least."""
    for name, flag in flags_of(request).items():
        value = getattr(request, name)
        if value is None:
            continue
        if flag.choices and value not in flag.choices:
            raise RequestError(f"{name_of(name)} {value}: choose one of {', '.join(flag.choices)}")
        if flag.least is not None and value < flag.least:
            raise RequestError(f"{name_of(name)} {value}: must be at least {flag.least}")


def integers(text: str) -> tuple[int, ...]:
    """The numbers of a text as `10,20`."""
    return _numbers(int, text, "10,20")


def decimals(text: str) -> tuple[float, ...]:
    """The numbers of a text as `2,4`."""
    return _numbers(float, text, "2,4")


def _numbers(kind: type[_Number], text: str, example: str) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"give numbers with commas between, e.g. {example}") from None
