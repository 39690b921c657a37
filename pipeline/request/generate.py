"""A generate request, validated once before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.request.writing import WritingRequest
from pipeline.teacher.quantization import loading_quantization

if TYPE_CHECKING:
    from featurestore.format.schema import GroupSpec
    from pipeline.teacher.checkpoint import Teacher

DEFAULT_SEQ_LEN = 2048
DEFAULT_STEP_TOKENS, DEFAULT_SHARD_TOKENS = 4096, 32_768
# The smallest measured head and tail whose gradient is within 5 degrees (benchmarks/results/store_size.md).
DEFAULT_HEAD: dict[str, int | float] = {"top_k": 12, "top_p": 0.7, "tail": 16}
PLAIN_HEAD: dict[str, int | float] = {"top_k": 64, "tail": 0}


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
        # Loads NumPy and the store's schema, for which `--help` need not wait.
        from pipeline.request.checks import check_request

        given = [self.top_k, self.top_p, self.tail]
        head = PLAIN_HEAD if any(flag is not None for flag in given) else DEFAULT_HEAD
        for field, default in head.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        check_request(self)

    @property
    def draws(self) -> int:
        """Tail draws of a position."""
        return self.tail or 0

    def groups(self, teacher: Teacher) -> tuple[GroupSpec, ...]:
        """The column groups asked for."""
        from featurestore.format.schema import HiddenSpec, LogitsSpec, LseSpec

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
