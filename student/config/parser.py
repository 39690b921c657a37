"""Parsing `from-cache`: our flags and every TrainingArguments flag, in any order, in both spellings."""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from distily.text import one_line
from student.config import sharding
from student.config.flags import OBJECTIVE_FLAGS, CommandOptions, StudentOptions
from student.config.help import EXAMPLES, INTRODUCTION, unknown_flag
from student.config.precision import settle
from student.config.training_config import complete, defaults
from student.errors import UserError

_BOOLEANS = frozenset({"true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"})
_COUNTING = ("--include_num_input_tokens_seen", "--include-num-input-tokens-seen")
_TOKEN_COUNTS = frozenset({"all", "non_padding"})
_DESCRIPTION = (
    f"{INTRODUCTION}\n{EXAMPLES}\nAfter our own flags come all of transformers' TrainingArguments.\n"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A parsed command line. stores: where the caches lie."""

    stores: tuple[str, ...]
    options: StudentOptions
    training: TrainingArguments
    notes: tuple[str, ...] = ()  # what was chosen for the user, to be shown before training
    as_json: bool = False
    quiet: bool = False


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Keeps the description's line breaks and shows one spelling of each flag, the one with dashes."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_action_invocation(self, action: Action) -> str:
        if len(action.option_strings) < 2 or not action.option_strings[0].startswith("--"):
            return super()._format_action_invocation(action)
        shown = action.option_strings[-1]
        if action.nargs == 0:
            return shown
        default = self._get_default_metavar_for_optional(action)
        return f"{shown} {self._format_args(action, default)}"


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `distily-train from-cache --help`")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """argparse's own; checks and completes the flags before TrainingArguments are made of them."""
        namespace, rest = super().parse_known_args(*args, **kwargs)
        complete(namespace)
        return namespace, rest


def make_parser() -> Any:
    """The parser of `from-cache`; its `error` raises UserError."""
    parser = _Parser(
        [CommandOptions, TrainingArguments],
        prog="distily-train from-cache",
        description=_DESCRIPTION,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        usage="distily-train from-cache STORE [STORE ...] --output-dir DIR [flags]",
    )
    parser.add_argument(
        "stores",
        metavar="STORE",
        nargs="+",
        help="cache made by `distily-cache generate`: a directory, s3://bucket/prefix or gs://bucket/prefix; "
        "several, of teachers with one tokenizer, teach together (--teacher-weights)",
    )
    parser.set_defaults(**defaults())
    parser.add_argument(
        "--no_bf16",
        "--no-bf16",
        dest="bf16",
        action="store_false",
        default=None,
        help="The same as --bf16 False.",
    )
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # bool | None: a bare flag means True, too
            action.nargs, action.const = "?", True
        action.required = action.required or action.dest == "output_dir"
        if action.dest == "include_num_input_tokens_seen":
            action.type = _token_count  # a string or a bool, which HfArgumentParser takes for a bool
    parser._optionals.title = "transformers TrainingArguments"
    own = next(group for group in parser._action_groups if group.title == CommandOptions._argument_group_name)
    parser._action_groups.remove(own)
    parser._action_groups.insert(1, own)
    return parser


def _token_count(value: str) -> str | bool:
    return value if value in _TOKEN_COUNTS else bool(string_to_bool(value))


def parse(argv: Sequence[str]) -> Request:
    """UserError for an unknown flag, a bad value or a missing STORE or --output-dir. `--help` exits
    as usual.
    """
    parser = make_parser()
    try:
        options, training, rest, unknown = parser.parse_args_into_dataclasses(
            args=bind_booleans(parser, argv),
            return_remaining_strings=True,
            look_for_args_file=False,
        )
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"TrainingArguments: {one_line(error, None)}") from error
    if unknown:
        raise UserError(unknown_word(parser, unknown[0]))
    if options.objective is not None:
        _check_alone(argv)
    options.check()
    return Request(
        stores=tuple(rest.stores),
        options=options,
        training=training,
        notes=(*settle(training, training.bf16), *sharding.settle(training, rest.sharded)),
        as_json=options.json,
        quiet=options.quiet,
    )


def bind_booleans(parser: Any, argv: Sequence[str]) -> list[str]:
    """`--bf16 STORE` -> `--bf16=True STORE`: a flag with an optional value must not swallow the word after
    it.
    """
    optional = {name for action in parser._actions if action.nargs == "?" for name in action.option_strings}
    bound = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        values = _BOOLEANS | _TOKEN_COUNTS if word in _COUNTING else _BOOLEANS
        alone = word in optional and following.lower() not in values
        bound.append(f"{word}=True" if alone else word)
    return bound


def _check_alone(argv: Sequence[str]) -> None:
    """UserError when a flag of a single term stands beside --objective, with whatever value."""
    for word in argv:
        name = word.split("=", 1)[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in OBJECTIVE_FLAGS:
            raise UserError(
                f"--objective and --{name.replace('_', '-')} exclude each other: the file says what is "
                "learned; put the term into it"
            )


def unknown_word(parser: Any, word: str) -> str:
    """What is wrong with a word that the parser does not know."""
    flag = word.split("=", maxsplit=1)[0]
    if not flag.startswith("-"):
        return (
            f"unexpected argument {word!r}: give every STORE in one place, e.g. in front of all flags; see "
            "`distily-train from-cache --help`"
        )
    return unknown_flag(flag, (name for action in parser._actions for name in action.option_strings))
