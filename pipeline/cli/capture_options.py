"""The flags of `generate` and `plan` that say which teacher, what is captured of it, and how it runs."""

from __future__ import annotations

from typing import Annotated

import typer

TeacherArgument = Annotated[
    str, typer.Argument(metavar="TEACHER", help="Local checkpoint directory or hub name of a causal LM.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="Head size: exact logits kept per position, or their cap with --top-p. 0: none. "
        "(default: 64; but without --top-k, --top-p and --tail: --top-k 12 --top-p 0.7 --tail 16)"
    ),
]
TopPOption = Annotated[
    float | None, typer.Option(help="End the head where its cumulative probability reaches P; at most K.")
]
TailOption = Annotated[
    int | None,
    typer.Option(
        help="How often to draw from outside the head: with some draws the student's gradient is unbiased. "
        "(default: see --top-k)"
    ),
]
TemperaturesOption = Annotated[
    str,
    typer.Option(
        help="Temperatures, e.g. 2,4: keeps logsumexp(logits / T) of each position, so that the head's "
        "probabilities at T are known. T=1 is always kept."
    ),
]
LayersOption = Annotated[
    str,
    typer.Option(
        help="Hidden states to keep, e.g. 10,20: 0 is the embeddings, i the residual stream after block i, "
        "numbered as transformers' output_hidden_states."
    ),
]
HiddenDtypeOption = Annotated[
    str,
    typer.Option(help="Stored type of hidden states: bf16, f32, or int8 / fp8 with a scale per position."),
]
FinalOption = Annotated[
    bool,
    typer.Option(
        "--final",
        help="Keep the state that enters the LM head, and once the head itself: together they give the whole "
        "distribution.",
    ),
]
RelationOption = Annotated[
    str,
    typer.Option(
        help="Decoder blocks, from 0, e.g. 10,20: keep the state that enters block i (hidden.L<i>), and once "
        "what makes queries, keys and values of it."
    ),
]
EngineOption = Annotated[
    str, typer.Option(help="vllm: fast, in-worker capture. transformers: slower, runs any causal LM.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Teacher's compute type: auto, bfloat16, float16 or float32. auto: as in the store where it "
        "holds rows, else as saved, but float32 where this CPU multiplies that much faster."
    ),
]
EightBitOption = Annotated[
    bool,
    typer.Option(
        "--teacher-load-in-8bit",
        help="Quantise the teacher to 8 bit while loading it: LLM.int8() of bitsandbytes with "
        "--engine transformers, fp8 with --engine vllm.",
    ),
]
FourBitOption = Annotated[
    bool,
    typer.Option(
        "--teacher-load-in-4bit",
        help="The same to 4 bit: NF4 of bitsandbytes, --engine transformers only.",
    ),
]
ParallelOption = Annotated[int, typer.Option(help="GPUs that share one teacher (vLLM).")]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Positions of one vLLM step, and of a batch of samples or texts in transformers. Smaller "
        "needs less memory; longer samples are chunked in vLLM and run alone in transformers. (default: "
        "4096; on a CPU what it computes in 5 seconds)"
    ),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the GPU's memory, in (0, 1], that vLLM may take (its default is 0.92): for weights "
        "and work, and with --continuations for the KV cache. Refused on a CPU."
    ),
]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the tail's draws, of written texts and of the engine.")
]
