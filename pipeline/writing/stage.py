"""The stage before capture: who writes, what is missing, and writing it piece by piece."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from distily.checkpoint.configs import json_object
from featurestore.format.schema import Sample
from featurestore.format.written import Text, WriterSpec, piece_name, publish_texts, read_piece, read_texts
from featurestore.storage.protocol import Root
from pipeline.errors import EngineError, RequestError
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import engine_config
from pipeline.teacher.checkpoint import Teacher, load_teacher, without_padding
from pipeline.teacher.tokenizer import load_tokenizer
from pipeline.writing.base import Writer
from pipeline.writing.plan import Array, WritingJob, WritingPlan, documents_of, jobs_of, prompts_of


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the stage did. by: the checkpoint's name. texts: of the request. new, tokens: texts written now,
    and their length together. seconds: wall-clock, with the start of the writer.
    """

    by: str
    writer: WriterSpec
    texts: int
    new: int
    tokens: int
    seconds: float


def find_writer(request: GenerateRequest, teacher: Teacher) -> Teacher:
    """The checkpoint that writes: the teacher, or the student of --from-student.

    Raises:
        RequestError: the student is no checkpoint, has another tokenizer, or takes too few tokens.
    """
    assert request.writing is not None
    name = request.writing.from_student
    if name is None:
        return teacher
    try:
        student = load_teacher(name, request.trust_remote_code)
        if student.tokenizer_digest != teacher.tokenizer_digest:
            _check_vocabularies(student, teacher, request.trust_remote_code)
        student = without_padding(student, load_tokenizer(student, request.trust_remote_code))
    except RequestError as error:
        raise RequestError(str(error).replace("TEACHER", "--from-student", 1)) from None
    _check_student(student, teacher, request.sequence_length(teacher))
    return student


def plan_writing(
    request: GenerateRequest,
    teacher: Teacher,
    writer: Teacher,
    samples: Sequence[Sample],
    prompt_tokens: int,
    root: Root | None,
) -> WritingPlan:
    """Which texts the request asks for, on prompts that samples begin with; the store has some of them.

    root: of the store, None where there is none yet.
    """
    assert request.writing is not None
    flags, by_teacher = request.writing, writer is teacher
    spec = WriterSpec(
        digest=writer.digest,
        engine=request.engine if by_teacher else "transformers",
        dtype=request.torch_dtype(teacher) if by_teacher else writer.config_dtype,
        temperature=float(flags.continuation_temperature),
        top_p=float(flags.continuation_top_p),
        max_tokens=flags.continuation_max_tokens,
        seed=request.seed,
        ends=end_tokens(writer, load_tokenizer(teacher, request.trust_remote_code)),
    )
    prompts = prompts_of(samples, prompt_tokens)
    documents = documents_of(samples, prompt_tokens)
    jobs = jobs_of(prompts, flags.continuations, documents)
    return WritingPlan(spec, jobs, read_texts(root, spec) if root else {}, request.shard_size)


def start_writer(
    request: GenerateRequest, model: Teacher, spec: WriterSpec, verbose: bool, report: Reporter
) -> Writer:
    """Load the checkpoint `model` in the engine that `spec` names."""
    config = engine_config(request, model, spec.dtype)
    report.stage(
        f"starting {spec.engine} with {model.architecture} in {spec.dtype}, to write"
        # The store knows writers by the digest of their saved weights, so those it is that write.
        + "; --teacher-load-in-8bit and -4bit are of the capture only" * request.in_fewer_bits
    )
    if spec.engine == "vllm":
        from pipeline.writing.vllm_writer import VllmWriter

        return VllmWriter(config, spec, verbose)
    from pipeline.writing.transformers_writer import TransformersWriter

    return TransformersWriter(config, spec)


def write_missing(
    plan: WritingPlan, root: Root, name: str, start: Callable[[], Writer], report: Reporter
) -> tuple[WritingPlan, Written]:
    """Write and keep what is missing, piece by piece; returns the plan that lacks nothing.

    Several commands may be at the same texts: each takes the pieces in an order of its own and leaves out
    those that another has kept meanwhile. `start` loads the writer, only if there is something to write; it
    is closed before this returns. name: of the writer, for the record.
    """
    clock, found, new, tokens = time.monotonic(), dict(plan.found), 0, 0
    writer: Writer | None = None
    report.writing(len(plan.jobs) - plan.missing, len(plan.jobs))
    try:
        for piece in random.SystemRandom().sample(plan.pieces, len(plan.pieces)):
            file = piece_name(plan.spec, [job.key for job in piece])
            if root.exists(file):
                texts = read_piece(root, file)[1]
                report.wrote(len(texts), 0)
            else:
                writer = writer or start()
                texts = publish_texts(root, plan.spec, _texts(piece, writer.write(piece, report.wrote)))
                new, tokens = new + len(texts), tokens + sum(len(text.tokens) for text in texts)
            found |= {text.key: text.tokens for text in texts}
    finally:
        if writer is not None:
            writer.close()
    written = Written(
        by=name,
        writer=plan.spec,
        texts=len(plan.jobs),
        new=new,
        tokens=tokens,
        seconds=round(time.monotonic() - clock, 3),
    )
    return replace(plan, found=found), written


def end_tokens(model: Teacher, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text, ascending: of the tokenizer, and of the checkpoint's configurations."""
    ends = {tokenizer.eos_token_id}
    for file in ("config.json", "generation_config.json"):
        named = json_object(model.path / file).get("eos_token_id")
        ends |= set(named if isinstance(named, list) else [named])
    return tuple(sorted(end for end in ends if isinstance(end, int) and 0 <= end < model.vocab_size))


def _texts(piece: Sequence[WritingJob], written: Sequence[Array]) -> list[Text]:
    if len(written) != len(piece) or not all(len(tokens) for tokens in written):
        raise EngineError(f"the writer returned {len(written)} texts for {len(piece)} prompts, or empty ones")
    return [Text(job.key, tokens) for job, tokens in zip(piece, written, strict=True)]


def _check_vocabularies(student: Teacher, teacher: Teacher, trust_remote_code: bool) -> None:
    """Files may differ in what does not matter (a chat template, a newer spelling); ids may not."""
    ours, theirs = (load_tokenizer(one, trust_remote_code).get_vocab() for one in (student, teacher))
    if ours != theirs:
        raise RequestError(
            f"--from-student {student.name}: its tokenizer is not the teacher's, which would read other text "
            "in its tokens; give a student with the teacher's tokenizer"
        )


def _check_student(student: Teacher, teacher: Teacher, longest: int) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise RequestError(
            f"--from-student {student.name}: its vocabulary has {student.vocab_size} tokens, the teacher's "
            f"{teacher.vocab_size}; give a student with the teacher's tokenizer"
        )
    if longest > student.max_position:
        raise RequestError(
            f"--from-student {student.name}: it takes at most {student.max_position} tokens, samples may "
            f"have {longest}; give --max-seq-len {student.max_position}"
        )
    if student.quantization == "bitnet" and not find_spec("accelerate"):
        raise RequestError(
            f"--from-student {student.name}: transformers needs accelerate to load a BitNet checkpoint; "
            "install the extra [train]"
        )
