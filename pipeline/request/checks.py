"""What a request asks for that nobody can give, whatever the teacher is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurestore.errors import StoreFormatError
from featurestore.format.schema import MAX_TAIL, LseSpec
from pipeline.engines.registry import find_engine
from pipeline.errors import RequestError

if TYPE_CHECKING:
    from pipeline.request.generate import GenerateRequest

DTYPES = ("auto", "bfloat16", "float16", "float32")
HIDDEN_DTYPES = ("bf16", "int8", "fp8", "f32")
LOSS_ON = ("assistant", "all")
LONG = ("split", "drop")
BAD_ROWS = ("refuse", "drop")

# Engines that write texts, too.
_WRITERS = ("vllm", "transformers")


def check_request(request: GenerateRequest) -> None:
    """Refuse values out of range and flags that contradict each other; RequestError names the first."""
    for flag, name, choices in (
        ("--dtype", request.dtype, DTYPES),
        ("--hidden-dtype", request.hidden_dtype, HIDDEN_DTYPES),
        ("--loss-on", request.loss_on, (None, *LOSS_ON)),
        ("--long", request.long, LONG),
        ("--bad-rows", request.bad_rows, BAD_ROWS),
    ):
        if name not in choices:
            raise RequestError(f"{flag} {name}: choose one of {', '.join(filter(None, choices))}")
    find_engine(request.engine)
    if request.top_p is not None and not 0.0 < request.top_p <= 1.0:
        raise RequestError(f"--top-p {request.top_p}: a probability in (0, 1] is needed")
    share = request.gpu_memory_utilization
    if share is not None and not 0.0 < share <= 1.0:
        raise RequestError(f"--gpu-memory-utilization {share}: a share in (0, 1] is needed")
    if share is not None and request.engine != "vllm":
        raise RequestError("--gpu-memory-utilization: only for --engine vllm; leave it out")
    for flag, value, least in (
        ("--num-samples", request.num_samples, 1),
        ("--shuffle-seed", request.shuffle_seed, 0),
        ("--min-seq-len", request.min_seq_len, 2),
        ("--max-seq-len", request.max_seq_len, 2),
        ("--top-k", request.top_k, 0),
        ("--tail", request.tail, 0),
        ("--seed", request.seed, 0),
        ("--tensor-parallel-size", request.tensor_parallel_size, 1),
        ("--max-num-batched-tokens", request.max_num_batched_tokens, 16),
        ("--shard-tokens", request.shard_tokens, 1),
    ):
        if value is not None and value < least:
            raise RequestError(f"{flag} {value}: must be at least {least}")
    hidden = request.hidden_layers or request.relation_layers or request.final
    if not (request.top_k or hidden or request.temperatures):
        raise RequestError(
            "--top-k 0: nothing to capture; ask for logits, --final, --hidden-layers or --temperatures"
        )
    if request.draws > MAX_TAIL:
        raise RequestError(f"--tail {request.tail}: at most {MAX_TAIL}")
    if request.draws and not request.top_k:
        raise RequestError("--tail: draws from outside the head need a head; give --top-k 1 or more")
    _check_distinct(request.hidden_layers, "--hidden-layers")
    _check_distinct(request.relation_layers, "--relation-layers")
    _check_temperatures(request.temperatures)
    _check_writing(request)


def _check_writing(request: GenerateRequest) -> None:
    if request.writing and request.writing.from_student is None and request.engine not in _WRITERS:
        raise RequestError(
            f"--continuations: --engine {request.engine} writes no text; use {' or '.join(_WRITERS)}"
        )
    if request.writing and (request.pack or request.append_eos or request.loss_on):
        given = {
            "--pack": request.pack,
            "--append-eos": request.append_eos,
            f"--loss-on {request.loss_on}": True,
        }
        flag = next(name for name, is_given in given.items() if is_given)
        raise RequestError(
            f"{flag}: not with --continuations, where a sample is a prompt and what is written on it; "
            "leave one of them out"
        )


def _check_distinct(layers: tuple[int, ...], flag: str) -> None:
    if len(set(layers)) != len(layers):
        raise RequestError(f"{flag}: the same layer is named twice")


def _check_temperatures(temperatures: tuple[float, ...]) -> None:
    for temperature in temperatures:
        try:
            LseSpec(temperature)
        except StoreFormatError as error:
            raise RequestError(f"--temperatures {temperature:g}: {error}") from None
    if len(set(temperatures)) != len(temperatures):
        raise RequestError("--temperatures: the same temperature is named twice")
