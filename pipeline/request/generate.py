"""A generate request, validated once before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass

from featurestore.errors import StoreFormatError
from featurestore.format.schema import MAX_TAIL, GroupSpec, HiddenSpec, LogitsSpec, LseSpec, TeacherIdentity
from pipeline.engines.base import EngineConfig
from pipeline.engines.registry import find_engine
from pipeline.errors import RequestError
from pipeline.request.writing import WritingRequest
from pipeline.teacher.checkpoint import Teacher
from pipeline.teacher.quantization import loading_quantization

DTYPES = ("auto", "bfloat16", "float16", "float32")
HIDDEN_DTYPES = ("bf16", "int8", "fp8", "f32")
LOSS_ON = ("assistant", "all")
LONG = ("split", "drop")
BAD_ROWS = ("refuse", "drop")
DEFAULT_SEQ_LEN = 2048
DEFAULT_STEP_TOKENS, DEFAULT_SHARD_TOKENS = 4096, 32_768
# The smallest measured head and tail whose gradient is within 5 degrees (benchmarks/results/store_size.md).
DEFAULT_HEAD: dict[str, int | float] = {"top_k": 12, "top_p": 0.7, "tail": 16}
PLAIN_HEAD: dict[str, int | float] = {"top_k": 64, "tail": 0}
MAX_TOP_K = 65_535

# Engines that write texts, too.
_WRITERS = ("vllm", "transformers")


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `distily-cache generate`, as the user gave them.

    Without top_k, top_p and tail the head is DEFAULT_HEAD; with any of them the others come from PLAIN_HEAD.
    A dtype `auto`, max_num_batched_tokens and shard_tokens that are None are chosen by what the machine does
    fast (pipeline/generate/sizing.py).
    With `writing` the data set gives prompts only, and the samples are what is written on them.
    """

    teacher: str
    dataset: str
    out: str
    split: str = "train"
    dataset_config: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    chat_template: str | None = None
    loss_on: str | None = None
    shuffle_seed: int | None = None
    num_samples: int | None = None
    min_seq_len: int | None = None
    max_seq_len: int | None = None
    long: str = "split"
    pack: bool = False
    append_eos: bool = False
    bad_rows: str = "refuse"
    top_k: int | None = None
    top_p: float | None = None
    tail: int | None = None
    temperatures: tuple[float, ...] = ()
    hidden_layers: tuple[int, ...] = ()
    hidden_dtype: str = "bf16"
    final: bool = False
    relation_layers: tuple[int, ...] = ()
    engine: str = "vllm"
    dtype: str = "auto"
    teacher_load_in_8bit: bool = False
    teacher_load_in_4bit: bool = False
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    shard_tokens: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    writing: WritingRequest | None = None

    def __post_init__(self) -> None:
        given = [self.top_k, self.top_p, self.tail]
        head = PLAIN_HEAD if any(flag is not None for flag in given) else DEFAULT_HEAD
        for field, default in head.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        for flag, name, choices in (
            ("--dtype", self.dtype, DTYPES),
            ("--hidden-dtype", self.hidden_dtype, HIDDEN_DTYPES),
            ("--loss-on", self.loss_on, (None, *LOSS_ON)),
            ("--long", self.long, LONG),
            ("--bad-rows", self.bad_rows, BAD_ROWS),
        ):
            if name not in choices:
                raise RequestError(f"{flag} {name}: choose one of {', '.join(filter(None, choices))}")
        find_engine(self.engine)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"--top-p {self.top_p}: a probability in (0, 1] is needed")
        share = self.gpu_memory_utilization
        if share is not None and not 0.0 < share <= 1.0:
            raise RequestError(f"--gpu-memory-utilization {share}: a share in (0, 1] is needed")
        if share is not None and self.engine != "vllm":
            raise RequestError("--gpu-memory-utilization: only for --engine vllm; leave it out")
        for flag, value, least in (
            ("--num-samples", self.num_samples, 1),
            ("--shuffle-seed", self.shuffle_seed, 0),
            ("--min-seq-len", self.min_seq_len, 2),
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
        self._check_writing()

    def _check_writing(self) -> None:
        if self.writing and self.writing.from_student is None and self.engine not in _WRITERS:
            raise RequestError(
                f"--continuations: --engine {self.engine} writes no text; use {' or '.join(_WRITERS)}"
            )
        if self.writing and (self.pack or self.append_eos or self.loss_on):
            given = {"--pack": self.pack, "--append-eos": self.append_eos, f"--loss-on {self.loss_on}": True}
            flag = next(name for name, is_given in given.items() if is_given)
            raise RequestError(
                f"{flag}: not with --continuations, where a sample is a prompt and what is written on it; "
                "leave one of them out"
            )

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
        """What `teacher` computes in; `auto` stands for the type that it is saved in."""
        return teacher.config_dtype if self.dtype == "auto" else self.dtype

    @property
    def step_size(self) -> int:
        """Positions of an engine's step."""
        return self.max_num_batched_tokens or DEFAULT_STEP_TOKENS

    @property
    def shard_size(self) -> int:
        """Positions of a new shard at most."""
        return self.shard_tokens or DEFAULT_SHARD_TOKENS

    @property
    def in_fewer_bits(self) -> bool:
        """Whether the teacher is to be quantised while it is loaded."""
        return self.teacher_load_in_8bit or self.teacher_load_in_4bit

    def quantize_to(self, teacher: Teacher) -> str | None:
        """What the weights are quantised to while they are loaded, None where they stay as saved."""
        if not self.in_fewer_bits:
            return None
        if self.teacher_load_in_8bit and self.teacher_load_in_4bit:
            raise RequestError("--teacher-load-in-4bit: not together with --teacher-load-in-8bit; choose one")
        bits = 8 if self.teacher_load_in_8bit else 4
        return loading_quantization(self.engine, bits, teacher.quantization, self.torch_dtype(teacher))


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
        max_num_batched_tokens=request.step_size,
        gpu_memory_utilization=request.gpu_memory_utilization,
        trust_remote_code=request.trust_remote_code,
        seed=request.seed,
    )
