"""A generate request, validated once before anything expensive starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featurestore.errors import StoreAccessError, StoreFormatError
from featurestore.root import is_url, root_of
from featurestore.schema import MAX_TAIL, GroupSpec, HiddenSpec, LogitsSpec, LseSpec, TeacherIdentity
from pipeline.errors import RequestError
from pipeline.teacher import Teacher

EngineName = Literal["vllm", "transformers"]
ENGINES: tuple[EngineName, ...] = ("vllm", "transformers")
DTYPES = ("auto", "bfloat16", "float16", "float32")
HIDDEN_DTYPES = ("bf16", "int8", "fp8", "f32")
DEFAULT_SEQ_LEN = 2048
# The smallest measured head and tail whose gradient is within 5 degrees (benchmarks/results/store_size.md).
DEFAULT_HEAD: dict[str, int | float] = {"top_k": 12, "top_p": 0.7, "tail": 16}
PLAIN_HEAD: dict[str, int | float] = {"top_k": 64, "tail": 0}
MAX_TOP_K = 65_535


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `distily-cache generate`, as the user gave them.

    Without top_k, top_p and tail the head is DEFAULT_HEAD; with any of them the others come from PLAIN_HEAD.
    """

    teacher: str
    dataset: str
    out: str
    split: str = "train"
    dataset_config: str | None = None
    text_column: str = "text"
    num_samples: int | None = None
    max_seq_len: int | None = None
    pack: bool = False
    top_k: int | None = None
    top_p: float | None = None
    tail: int | None = None
    temperatures: tuple[float, ...] = ()
    hidden_layers: tuple[int, ...] = ()
    hidden_dtype: str = "bf16"
    final: bool = False
    relation_layers: tuple[int, ...] = ()
    engine: EngineName = "vllm"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 4096
    shard_tokens: int = 32_768
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        given = [self.top_k, self.top_p, self.tail]
        head = PLAIN_HEAD if any(flag is not None for flag in given) else DEFAULT_HEAD
        for name, default in head.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.engine not in ENGINES:
            raise RequestError(f"--engine {self.engine}: choose one of {', '.join(ENGINES)}")
        if self.dtype not in DTYPES:
            raise RequestError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.hidden_dtype not in HIDDEN_DTYPES:
            raise RequestError(
                f"--hidden-dtype {self.hidden_dtype}: choose one of {', '.join(HIDDEN_DTYPES)}"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"--top-p {self.top_p}: a probability in (0, 1] is needed")
        for flag, value, least in (
            ("--num-samples", self.num_samples, 1),
            ("--max-seq-len", self.max_seq_len, 2),
            ("--top-k", self.top_k, 0),
            ("--tail", self.tail, 0),
            ("--seed", self.seed, 0),
            ("--tensor-parallel-size", self.tensor_parallel_size, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 16),
            ("--shard-tokens", self.shard_tokens, 1),
        ):
            if value is not None and value < least:
                raise RequestError(f"{flag} {value}: must be at least {least}")
        hidden = self.hidden_layers or self.relation_layers or self.final
        if not (self.top_k or hidden or self.temperatures):
            raise RequestError(
                "--top-k 0: nothing to capture; ask for logits, --final, --hidden-layers or --temperatures"
            )
        if self.draws > MAX_TAIL:
            raise RequestError(f"--tail {self.tail}: at most {MAX_TAIL}")
        if self.draws and not self.top_k:
            raise RequestError("--tail: draws from outside the head need a head; give --top-k 1 or more")
        _check_distinct(self.hidden_layers, "--hidden-layers")
        _check_distinct(self.relation_layers, "--relation-layers")
        _check_temperatures(self.temperatures)

    @property
    def draws(self) -> int:
        """Tail draws of a position."""
        return self.tail or 0

    def groups(self, teacher: Teacher) -> tuple[GroupSpec, ...]:
        """The column groups asked for."""
        seed = self.seed if self.draws else 0
        logits = (LogitsSpec(self.top_k, self.top_p, self.draws, seed),) if self.top_k else ()
        lse = (LseSpec(temperature) for temperature in sorted(self.temperatures))
        final = {teacher.num_layers} if self.final else set()
        layers = final.union(self.hidden_layers, self.relation_layers)
        hidden = (HiddenSpec(layer, self.hidden_dtype) for layer in sorted(layers))
        return (*logits, *lse, *hidden)

    def sequence_length(self, teacher: Teacher) -> int:
        return self.max_seq_len or min(DEFAULT_SEQ_LEN, teacher.max_position)

    def torch_dtype(self, teacher: Teacher) -> str:
        return teacher.config_dtype if self.dtype == "auto" else self.dtype


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


def check_against_teacher(request: GenerateRequest, teacher: Teacher) -> None:
    """Refuse what this teacher cannot give.

    Raises:
        RequestError: k over the vocabulary, a layer out of range, or sequences over the model's limit.
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
    if request.sequence_length(teacher) > teacher.max_position:
        raise RequestError(
            f"--max-seq-len {request.max_seq_len}: {teacher.name} takes at most {teacher.max_position} tokens"
        )


def identity_of(request: GenerateRequest, teacher: Teacher, engine_version: str) -> TeacherIdentity:
    """What the store will say of the numbers in it."""
    return TeacherIdentity(
        name=teacher.name if not Path(teacher.name).is_dir() else str(teacher.path),
        architecture=teacher.architecture,
        digest=teacher.digest,
        tokenizer_digest=teacher.tokenizer_digest,
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        num_layers=teacher.num_layers,
        max_position=teacher.max_position,
        engine=request.engine,
        engine_version=engine_version,
        dtype=request.torch_dtype(teacher),
        quantization=teacher.quantization,
    )


def check_store_directory(place: str) -> None:
    """Refuse a store that cannot be created or written, or a place that is in use for something else. Of an
    object store, that it can be listed is all that is known before the first write.

    Raises:
        RequestError: it is a file, holds other files, the nearest existing directory above it is not
            writable, or the object store does not answer.
    """
    if is_url(place):
        try:
            root_of(place).probe()
        except (StoreAccessError, StoreFormatError) as error:
            raise RequestError(f"--out {error}") from error
        return
    out = Path(place)
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: exists and is not a directory")
    nearest = next((p for p in (out, *out.absolute().parents) if p.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"--out {out}: {nearest} is not writable")
    if out.is_dir() and not (out / "SPEC.json").exists() and any(out.iterdir()):
        raise RequestError(f"--out {out}: not empty and not a feature store; choose another directory")
