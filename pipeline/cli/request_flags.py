"""The flags that make a request, once for the two commands that take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pipeline.cli.capture_options import (
    BatchOption,
    DtypeOption,
    EightBitOption,
    EngineOption,
    FinalOption,
    FourBitOption,
    HiddenDtypeOption,
    LayersOption,
    MemoryOption,
    ParallelOption,
    RelationOption,
    SeedOption,
    TailOption,
    TeacherArgument,
    TemperaturesOption,
    TopKOption,
    TopPOption,
)
from pipeline.cli.data_options import (
    BadRowsOption,
    ConfigOption,
    DatasetArgument,
    EndOption,
    LengthOption,
    LongOption,
    LossOption,
    MessagesOption,
    PackOption,
    SamplesOption,
    ShortestOption,
    ShuffleOption,
    SplitOption,
    TemplateOption,
    TextOption,
)
from pipeline.cli.options import OutOption, ShardSizeOption, TrustOption
from pipeline.cli.writing_options import (
    ContinuationsOption,
    MaxTokensOption,
    NucleusOption,
    PromptOption,
    StudentOption,
    TemperatureOption,
)
from pipeline.errors import RequestError

if TYPE_CHECKING:
    from pipeline.request.generate import GenerateRequest

Command = Callable[..., None]
# Headings of `--help` -> the flags under them; what is not named here stands first.
_HEADINGS = {
    "Data": (
        "split",
        "dataset_config",
        "text_column",
        "messages_column",
        "chat_template",
        "loss_on",
        "shuffle_seed",
        "num_samples",
        "min_seq_len",
        "max_seq_len",
        "long",
        "pack",
        "append_eos",
        "bad_rows",
    ),
    "What is stored of the distribution": ("top_k", "top_p", "tail", "temperatures"),
    "Hidden states, and weights for losses on them": (
        "hidden_layers",
        "hidden_dtype",
        "final",
        "relation_layers",
    ),
    "Engine": (
        "engine",
        "dtype",
        "teacher_load_in_8bit",
        "teacher_load_in_4bit",
        "tensor_parallel_size",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "shard_tokens",
        "seed",
        "trust_remote_code",
    ),
    "Texts that the teacher or a student writes first": (
        "continuations",
        "from_student",
        "prompt_tokens",
        "continuation_temperature",
        "continuation_top_p",
        "continuation_max_tokens",
    ),
}


@dataclass(frozen=True)
class RequestFlags:
    """The command line's words, in the order of `--help`; defaults are those of `GenerateRequest`."""

    teacher: TeacherArgument
    dataset: DatasetArgument
    out: OutOption
    split: SplitOption = "train"
    dataset_config: ConfigOption = None
    text_column: TextOption = None
    messages_column: MessagesOption = None
    chat_template: TemplateOption = None
    loss_on: LossOption = None
    shuffle_seed: ShuffleOption = None
    num_samples: SamplesOption = None
    min_seq_len: ShortestOption = None
    max_seq_len: LengthOption = None
    long: LongOption = "split"
    pack: PackOption = False
    append_eos: EndOption = False
    bad_rows: BadRowsOption = "refuse"
    top_k: TopKOption = None
    top_p: TopPOption = None
    tail: TailOption = None
    temperatures: TemperaturesOption = ""
    hidden_layers: LayersOption = ""
    hidden_dtype: HiddenDtypeOption = "bf16"
    final: FinalOption = False
    relation_layers: RelationOption = ""
    engine: EngineOption = "vllm"
    dtype: DtypeOption = "auto"
    teacher_load_in_8bit: EightBitOption = False
    teacher_load_in_4bit: FourBitOption = False
    tensor_parallel_size: ParallelOption = 1
    max_num_batched_tokens: BatchOption = None
    gpu_memory_utilization: MemoryOption = None
    shard_tokens: ShardSizeOption = None
    seed: SeedOption = 0
    trust_remote_code: TrustOption = False
    continuations: ContinuationsOption = None
    from_student: StudentOption = None
    prompt_tokens: PromptOption = None
    continuation_temperature: TemperatureOption = None
    continuation_top_p: NucleusOption = None
    continuation_max_tokens: MaxTokensOption = None

    def request(self) -> GenerateRequest:
        """The flags as a validated request; RequestError names the flag that cannot be served."""
        from pipeline.request.generate import GenerateRequest
        from pipeline.request.writing import writing_request

        flags = asdict(self)
        for name, kind, example in (
            ("hidden_layers", int, "10,20"),
            ("relation_layers", int, "10,20"),
            ("temperatures", float, "2,4"),
        ):
            flags[name] = _numbers(kind, flags[name], "--" + name.replace("_", "-"), example)
        flags["writing"] = writing_request(flags)
        return GenerateRequest(**{field.name: flags[field.name] for field in fields(GenerateRequest)})


def takes_request(without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command, as its first argument, the `RequestFlags` of its command line, before its own flags.

    Fields named in `without` are no flags of this command and keep their defaults.
    """
    shared = [
        _under_heading(flag)
        for flag in inspect.signature(RequestFlags, eval_str=True).parameters.values()
        if flag.name not in without
    ]

    def decorate(command: Command) -> Command:
        own = [*inspect.signature(command, eval_str=True).parameters.values()][1:]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            flags = {flag.name: given.pop(flag.name) for flag in shared}
            command(RequestFlags(**flags), **given)

        # What typer makes the options from.
        run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        return run

    return decorate


def _under_heading(flag: inspect.Parameter) -> inspect.Parameter:
    """The same flag, shown under its heading."""
    heading = next((heading for heading, names in _HEADINGS.items() if flag.name in names), None)
    kind, info = get_args(flag.annotation)
    shown = copy(info)
    shown.rich_help_panel = heading
    return flag.replace(annotation=Annotated[kind, shown])


def _numbers(kind: type[int | float], text: str, flag: str, example: str) -> tuple[int | float, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RequestError(f"{flag} {text}: give numbers with commas between, e.g. {example}") from None
