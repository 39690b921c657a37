"""A generate request, validated once before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.request.flags import decimals, flag, integers
from pipeline.request.writing import WritingRequest
from pipeline.teacher.quantization import loading_quantization

if TYPE_CHECKING:
    from featurestore.format.schema import GroupSpec
    from pipeline.teacher.checkpoint import Teacher

DEFAULT_SEQ_LEN = 2048
DEFAULT_SHARD_TOKENS = 32_768
# The smallest measured head and tail whose gradient is within 5 degrees (benchmarks/results/store_size.md).
DEFAULT_HEAD: dict[str, int | float] = {"top_k": 12, "top_p": 0.7, "tail": 16}
PLAIN_HEAD: dict[str, int | float] = {"top_k": 64, "tail": 0}

# Headings of `--help`.
_DATA = "Data"
_DISTRIBUTION = "What is stored of the distribution"
_HIDDEN = "Hidden states, and weights for losses on them"
_ENGINE = "Engine"


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The flags of `distily-cache generate`, as the user gave them.

    The command line has a flag for each field here and in `WritingRequest`, in their order: all that it needs
    to know of a flag stands in the field's metadata.

    Without top_k, top_p and tail the head is DEFAULT_HEAD; with any of them the others come from PLAIN_HEAD.
    A dtype `auto`, max_num_batched_tokens and shard_tokens that are None are chosen by what the machine does
    fast (pipeline/generate/sizing.py).
    With `writing` the data set gives prompts only, and the samples are what is written on them.
    """

    teacher: str = field(
        metadata=flag(
            "Local checkpoint directory or hub name of a causal LM.", metavar="TEACHER", positional=True
        )
    )
    dataset: str = field(
        metadata=flag(
            "Local file or folder of .txt, .md, .jsonl, .json, .csv, .tsv, .parquet or .arrow, also with "
            ".gz, .zst or .bz2 behind it; a saved `datasets` directory, or a hub name.",
            metavar="DATASET",
            positional=True,
        )
    )
    out: str = field(
        metadata=flag("Feature store to create or to extend: a directory, s3://bucket/prefix or gs://...")
    )
    split: str = field(
        default="train", metadata=flag("Split, or a slice of it: train[:1000], train[:10%]+test.", _DATA)
    )
    dataset_config: str | None = field(
        default=None,
        metadata=flag("Configuration of a data set that has several, e.g. 20231101.en.", _DATA),
    )
    text_column: str | None = field(
        default=None,
        metadata=flag(
            "Column that holds texts. (default: text; a data set with both text and messages needs this "
            "flag or --messages-column)",
            _DATA,
        ),
    )
    messages_column: str | None = field(
        default=None,
        metadata=flag(
            "Column that holds chats, lists of {role, content} or of {from, value}, which the chat template "
            "turns into text. (default: messages, conversations, or the columns of Alpaca, whichever is "
            "there)",
            _DATA,
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=flag("Jinja chat template to use instead of the tokenizer's own.", _DATA, metavar="FILE"),
    )
    loss_on: str | None = field(
        default=None,
        metadata=flag(
            "Tokens that a student learns: all, or assistant: what it says and the end of its turn. "
            "(default: assistant for chats, all for texts)",
            _DATA,
            choices=("assistant", "all"),
        ),
    )
    shuffle_seed: int | None = field(
        default=None,
        metadata=flag(
            "Shuffle the documents by this seed before samples are taken. (default: in order)",
            _DATA,
            least=0,
        ),
    )
    streaming: bool | None = field(
        default=None,
        metadata=flag(
            "Read DATASET once from its first row to its last while the teacher runs; nothing is counted, "
            "downloaded or converted before. --shuffle-seed then shuffles within a buffer of 10,000 rows. "
            "(default: for local files of 1 GiB and more that are neither shuffled nor sliced)",
            _DATA,
            negatable=True,
        ),
    )
    num_samples: int | None = field(
        default=None,
        metadata=flag("Capture the first N samples only (after cutting or packing).", _DATA, least=1),
    )
    min_seq_len: int | None = field(
        default=None, metadata=flag("Leave out samples of fewer tokens. (default: 2)", _DATA, least=2)
    )
    max_seq_len: int | None = field(
        default=None,
        metadata=flag(
            "Longest sample in tokens. (default: 2048, or the model's limit if lower)", _DATA, least=2
        ),
    )
    long: str = field(
        default="split",
        metadata=flag(
            "Documents over --max-seq-len: split them into several samples, or drop them.",
            _DATA,
            choices=("split", "drop"),
        ),
    )
    pack: bool = field(
        default=False,
        metadata=flag(
            "Join documents with the end-of-sequence token into full samples, instead of cutting each "
            "document on its own.",
            _DATA,
            negatable=True,
        ),
    )
    append_eos: bool = field(
        default=False,
        metadata=flag(
            "Put the end-of-sequence token behind each text, where the tokenizer does not, so that students "
            "learn where a text ends.",
            _DATA,
            negatable=True,
        ),
    )
    bad_rows: str = field(
        default="refuse",
        metadata=flag(
            "Rows that cannot be used, e.g. a chat that the template refuses: refuse the data set and say "
            "how many there are, or drop them and say how many were dropped.",
            _DATA,
            choices=("refuse", "drop"),
        ),
    )
    top_k: int | None = field(
        default=None,
        metadata=flag(
            "Head size: exact logits kept per position, or their cap with --top-p. 0: none. (default: 64; "
            "but without --top-k, --top-p and --tail: --top-k 12 --top-p 0.7 --tail 16)",
            _DISTRIBUTION,
            least=0,
        ),
    )
    top_p: float | None = field(
        default=None,
        metadata=flag("End the head where its cumulative probability reaches P; at most K.", _DISTRIBUTION),
    )
    tail: int | None = field(
        default=None,
        metadata=flag(
            "How often to draw from outside the head: with some draws the student's gradient is unbiased. "
            "(default: see --top-k)",
            _DISTRIBUTION,
            least=0,
        ),
    )
    temperatures: tuple[float, ...] = field(
        default=(),
        metadata=flag(
            "Temperatures, e.g. 2,4: keeps logsumexp(logits / T) of each position, so that the head's "
            "probabilities at T are known. T=1 is always kept.",
            _DISTRIBUTION,
            parse=decimals,
        ),
    )
    hidden_layers: tuple[int, ...] = field(
        default=(),
        metadata=flag(
            "Hidden states to keep, e.g. 10,20: 0 is the embeddings, i the residual stream after block i, "
            "numbered as transformers' output_hidden_states.",
            _HIDDEN,
            parse=integers,
        ),
    )
    hidden_dtype: str = field(
        default="bf16",
        metadata=flag(
            "Stored type of hidden states: bf16, f32, int8 or fp8 with a scale per position, or int4 and "
            "int2: 0.55 and 0.3 bytes a number, in rotated blocks with a scale each. int2 is for students "
            "that are far from the teacher.",
            _HIDDEN,
            choices=("bf16", "int8", "fp8", "int4", "int2", "f32"),
        ),
    )
    hidden_positions: float = field(
        default=1.0,
        metadata=flag(
            "Share F of the positions, drawn at random, at which --hidden-layers are kept. Each counts 1/F "
            "in losses of single positions, which stay unbiased; a larger F later adds the further ones. "
            "--final and --relation-layers keep all.",
            _HIDDEN,
        ),
    )
    final: bool = field(
        default=False,
        metadata=flag(
            "Keep the state that enters the LM head, and once the head itself: together they give the whole "
            "distribution.",
            _HIDDEN,
        ),
    )
    final_dtype: str | None = field(
        default=None,
        metadata=flag(
            "Stored type of --final, if it is another than --hidden-dtype. klt4 and klt6: 4 or 6 bits a "
            "number in a basis that is calibrated on the first shard and kept in the cache, so that the "
            "distribution changes least: KL of about 4e-3 or 3e-4 nats.",
            _HIDDEN,
            choices=("bf16", "int8", "fp8", "int4", "f32", "klt4", "klt6"),
        ),
    )
    relation_layers: tuple[int, ...] = field(
        default=(),
        metadata=flag(
            "Decoder blocks, from 0, e.g. 10,20: keep the state that enters block i (hidden.L<i>), and once "
            "what makes queries, keys and values of it.",
            _HIDDEN,
            parse=integers,
        ),
    )
    engine: str = field(
        default="vllm",
        metadata=flag("vllm: fast, in-worker capture. transformers: slower, runs any causal LM.", _ENGINE),
    )
    dtype: str = field(
        default="auto",
        metadata=flag(
            "Teacher's compute type: auto, bfloat16, float16 or float32. auto: as in the store where it "
            "holds rows, else as saved, but float32 where this CPU multiplies that much faster.",
            _ENGINE,
            choices=("auto", "bfloat16", "float16", "float32"),
        ),
    )
    teacher_load_in_8bit: bool = field(
        default=False,
        metadata=flag(
            "Quantise the teacher to 8 bit while loading it: LLM.int8() of bitsandbytes with "
            "--engine transformers, fp8 with --engine vllm.",
            _ENGINE,
        ),
    )
    teacher_load_in_4bit: bool = field(
        default=False,
        metadata=flag("The same to 4 bit: NF4 of bitsandbytes, --engine transformers only.", _ENGINE),
    )
    tensor_parallel_size: int = field(
        default=1, metadata=flag("GPUs that share one teacher (vLLM).", _ENGINE, least=1)
    )
    data_parallel: int = field(
        default=1,
        metadata=flag(
            "Engines that capture side by side, each in a process of its own on as many GPUs as "
            "--tensor-parallel-size says; without a GPU each has its share of the CPU's cores.",
            _ENGINE,
            least=1,
        ),
    )
    ray: str | None = field(
        default=None,
        metadata=flag(
            "Capture on a Ray cluster with as many engines as --workers says: its address, or nothing for "
            "the one that runs here, or a new one. Each machine has to reach the store and the teacher.",
            _ENGINE,
            metavar="ADDRESS",
            alone="auto",
        ),
    )
    workers: int | None = field(
        default=None, metadata=flag("Engines on the Ray cluster. (default: 1)", _ENGINE, least=1)
    )
    gpus_per_worker: float | None = field(
        default=None,
        metadata=flag(
            "GPUs of each engine on the Ray cluster, or a share of one, e.g. 0.5. (default: "
            "--tensor-parallel-size, and none where the cluster has none)",
            _ENGINE,
        ),
    )
    max_num_batched_tokens: int | None = field(
        default=None,
        metadata=flag(
            "Positions of one vLLM step, and of a batch of samples or texts in transformers. Smaller needs "
            "less memory; longer samples are chunked in vLLM and run alone in transformers. (default: on a "
            "GPU vLLM's own, 16384 on an H100, and 4096 in transformers; on a CPU what it computes in 5 "
            "seconds)",
            _ENGINE,
            least=16,
        ),
    )
    gpu_memory_utilization: float | None = field(
        default=None,
        metadata=flag(
            "Share of the GPU's memory, in (0, 1], that vLLM may take (its default is 0.92): for weights "
            "and work, and with --continuations for the KV cache. Refused on a CPU.",
            _ENGINE,
        ),
    )
    shard_tokens: int | None = field(
        default=None,
        metadata=flag(
            "Positions per shard, the unit of commit: a kill costs those in the making. (default: what this "
            "machine captures in 5 minutes, at most 32768; the first shard is smaller)",
            _ENGINE,
            least=1,
        ),
    )
    seed: int = field(
        default=0,
        metadata=flag(
            "Seed of the tail's draws, of --hidden-positions, of written texts and of the engine.",
            _ENGINE,
            least=0,
        ),
    )
    trust_remote_code: bool = field(
        default=False, metadata=flag("Allow the teacher's own Python code to run.", _ENGINE)
    )
    writing: WritingRequest | None = None

    def __post_init__(self) -> None:
        # Loads NumPy and the store's schema, for which `--help` need not wait.
        from pipeline.request.checks import check_request

        given = [self.top_k, self.top_p, self.tail]
        head = PLAIN_HEAD if any(flag is not None for flag in given) else DEFAULT_HEAD
        for name, default in head.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
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
        whole = final.union(self.relation_layers, self.hidden_layers if self.hidden_positions == 1 else ())
        hidden = (
            HiddenSpec(layer, (self.final_dtype if layer in final else None) or self.hidden_dtype)
            if layer in whole
            else HiddenSpec(layer, self.hidden_dtype, self.hidden_positions, self.seed)
            for layer in sorted(whole.union(self.hidden_layers))
        )
        return (*logits, *lse, *hidden)

    def sequence_length(self, teacher: Teacher) -> int:
        return self.max_seq_len or min(DEFAULT_SEQ_LEN, teacher.max_position)

    def torch_dtype(self, teacher: Teacher) -> str:
        """What `teacher` computes in; `auto` stands for the type that it is saved in."""
        return teacher.config_dtype if self.dtype == "auto" else self.dtype

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
