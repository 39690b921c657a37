"""What a request asks for that nobody can give, whatever the teacher is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurestore.errors import StoreFormatError
from featurestore.format.schema import MAX_TAIL, LseSpec
from pipeline.engines.registry import find_engine
from pipeline.errors import RequestError
from pipeline.request.flags import check_flags

if TYPE_CHECKING:
    from pipeline.request.generate import GenerateRequest

# Engines that write texts, too.
_WRITERS = ("vllm", "transformers")


def check_request(request: GenerateRequest) -> None:
    """Refuse values out of range and flags that contradict each other; RequestError names the first."""
    check_flags(request)
    find_engine(request.engine)
    if request.top_p is not None and not 0.0 < request.top_p <= 1.0:
        raise RequestError(f"--top-p {request.top_p}: a probability in (0, 1] is needed")
    share = request.gpu_memory_utilization
    if share is not None and not 0.0 < share <= 1.0:
        raise RequestError(f"--gpu-memory-utilization {share}: a share in (0, 1] is needed")
    if share is not None and request.engine != "vllm":
        raise RequestError("--gpu-memory-utilization: only for --engine vllm; leave it out")
    if not 0.0 < request.hidden_positions <= 1.0:
        raise RequestError(f"--hidden-positions {request.hidden_positions:g}: a share in (0, 1] is needed")
    if request.hidden_positions < 1 and not request.hidden_layers:
        raise RequestError(
            f"--hidden-positions {request.hidden_positions:g}: has no effect without --hidden-layers; add "
            "layers, or leave this out"
        )
    if request.final_dtype is not None and not request.final:
        raise RequestError(
            f"--final-dtype {request.final_dtype}: has no effect without --final; add it, or leave this out"
        )
    _check_ray(request)
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


def _check_ray(request: GenerateRequest) -> None:
    for name, value in (("--workers", request.workers), ("--gpus-per-worker", request.gpus_per_worker)):
        if value is not None and not request.ray:
            raise RequestError(f"{name} {value:g}: has no effect without --ray; add it, or leave this out")
    if request.ray and request.data_parallel > 1:
        raise RequestError(
            f"--data-parallel {request.data_parallel}: not together with --ray; give --workers instead"
        )
    gpus = request.gpus_per_worker
    if gpus is not None and not (gpus >= 0 and (gpus <= 1 or gpus == int(gpus))):
        raise RequestError(f"--gpus-per-worker {gpus:g}: a share from 0 to 1, or a whole number, is needed")


def _check_writing(request: GenerateRequest) -> None:
    if request.writing and request.writing.from_student is None and request.engine not in _WRITERS:
        raise RequestError(
            f"--continuations: --engine {request.engine} writes no text; use {' or '.join(_WRITERS)}"
        )
    given = {
        "--pack": request.pack,
        "--append-eos": request.append_eos,
        f"--loss-on {request.loss_on}": request.loss_on,
    }
    flag = next((name for name, value in given.items() if value), None)
    if request.writing and flag:
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
