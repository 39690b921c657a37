"""The command line's flags of a request: each is made of the request's field, which says all of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import typer

from pipeline.errors import RequestError
from pipeline.request.flags import Flag, flags_of, name_of
from pipeline.request.generate import GenerateRequest
from pipeline.request.writing import WritingRequest, writing_request

Command = Callable[..., None]


def takes_request(without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command, as its first argument, the flags of a request by field, before its own flags.

    Fields named in `without` are no flags of this command and keep their defaults.
    """
    flags = [flag for flag in _parameters() if flag.name not in without]

    def decorate(command: Command) -> Command:
        own = [*inspect.signature(command, eval_str=True).parameters.values()][1:]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command({flag.name: given.pop(flag.name) for flag in flags}, **given)

        # What typer makes the options from.
        run.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
        return run

    return decorate


def request_of(given: Mapping[str, Any]) -> GenerateRequest:
    """The flags that `takes_request` gave a command as a validated request.

    Raises:
        RequestError: one of them, which is named, cannot be served.
    """
    values = {
        name: _parsed(name, flag, given[name])
        for name, flag in flags_of(GenerateRequest).items()
        if name in given
    }
    return GenerateRequest(**values, writing=writing_request(given))


def info_of(name: str) -> Any:
    """What typer needs of one of the request's flags, for a command that takes it without a request."""
    return _info(name, flags_of(GenerateRequest)[name], under_heading=False)


def _parameters() -> Iterator[inspect.Parameter]:
    """What typer needs of every flag of a request, in the order of `--help`."""
    types = get_type_hints(GenerateRequest)
    defaults = {field.name: field.default for field in fields(GenerateRequest)}
    for name, flag in flags_of(GenerateRequest).items():
        # Parsed by `request_of`, so that a text that is no such value is refused as other values are.
        kind, default = (str, "") if flag.parse else (types[name], defaults[name])
        yield _parameter(name, flag, kind, inspect.Parameter.empty if default is MISSING else default)
    types = get_type_hints(WritingRequest)
    for name, flag in flags_of(WritingRequest).items():
        # None is "not given": a value that is given, be it the default, is refused without --continuations.
        yield _parameter(name, flag, types[name] | None, None)


def _parameter(name: str, flag: Flag, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[kind, _info(name, flag)],
    )


def _info(name: str, flag: Flag, under_heading: bool = True) -> Any:
    if flag.positional:
        return typer.Argument(metavar=flag.metavar, help=flag.help)
    written = name_of(name)
    return typer.Option(
        f"{written}/--no-{written.removeprefix('--')}" if flag.negatable else written,
        help=flag.help,
        metavar=flag.metavar,
        rich_help_panel=flag.heading if under_heading else None,
    )


def _parsed(name: str, flag: Flag, value: Any) -> Any:
    if flag.parse is None:
        return value
    try:
        return flag.parse(value)
    except ValueError as error:
        raise RequestError(f"{name_of(name)} {value}: {error}") from None
