"""A request and its teacher: what this teacher cannot give, how it is loaded, what the store says of it."""

from __future__ import annotations

from featurestore.format.schema import MAX_TOP_K, GroupSpec, TeacherIdentity
from featurestore.format.states.transform import MAX_TRANSFORMED, MIN_SIZE, TRANSFORMED
from pipeline.engines.base import EngineConfig
from pipeline.errors import RequestError
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import Teacher


def check_against_teacher(request: GenerateRequest, teacher: Teacher) -> None:
    """Refuse what this teacher cannot give.

    Raises:
        RequestError: k over the vocabulary, a layer out of range, sequences over the model's limit, or
            shortest samples over the longest.
    """
    if request.top_k is not None and request.top_k > min(teacher.vocab_size, MAX_TOP_K):
        raise RequestError(
            f"--top-k {request.top_k}: larger than the vocabulary of {teacher.vocab_size}"
            if teacher.vocab_size <= MAX_TOP_K
            else f"--top-k {request.top_k}: at most {MAX_TOP_K}"
        )
    for layer in request.hidden_layers:
        if not 0 <= layer <= teacher.num_layers:
            raise RequestError(
                f"--hidden-layers {layer}: out of range, there are 0 (embeddings) to {teacher.num_layers}"
            )
    for layer in request.relation_layers:
        if not 0 <= layer < teacher.num_layers:
            raise RequestError(
                f"--relation-layers {layer}: out of range, the blocks are 0 to {teacher.num_layers - 1}"
            )
    size = teacher.hidden_size
    if request.final_dtype in TRANSFORMED and not MIN_SIZE <= size <= MAX_TRANSFORMED:
        raise RequestError(
            f"--final-dtype {request.final_dtype}: for states of {MIN_SIZE} to {MAX_TRANSFORMED:,} numbers, "
            f"the teacher's have {size:,}; choose another type"
        )
    length = request.sequence_length(teacher)
    if request.min_seq_len is not None and request.min_seq_len > length:
        raise RequestError(f"--min-seq-len {request.min_seq_len}: longer than the longest sample, {length}")
    if length > teacher.max_position:
        raise RequestError(
            f"--max-seq-len {request.max_seq_len}: {teacher.name} takes at most {teacher.max_position} tokens"
        )


def identity_of(request: GenerateRequest, teacher: Teacher, engine_version: str) -> TeacherIdentity:
    """What the store will say of the numbers in it; RequestError when the teacher cannot be loaded so."""
    return teacher.identity(
        engine=request.engine,
        engine_version=engine_version,
        dtype=request.torch_dtype(teacher),
        quantization=request.quantize_to(teacher) or teacher.quantization,
    )


def engine_config(
    request: GenerateRequest,
    model: Teacher,
    dtype: str,
    groups: tuple[GroupSpec, ...] = (),
    quantize_to: str | None = None,
) -> EngineConfig:
    """How to load `model`, the teacher or the student that writes, for this request."""
    return EngineConfig(
        model=model.path,
        architecture=model.architecture,
        groups=groups,
        dtype=dtype,
        max_seq_len=request.sequence_length(model),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        quantize_to=quantize_to,
        tensor_parallel_size=request.tensor_parallel_size,
        max_num_batched_tokens=request.max_num_batched_tokens,
        gpu_memory_utilization=request.gpu_memory_utilization,
        trust_remote_code=request.trust_remote_code,
        seed=request.seed,
    )
