"""The samples of a request: its data set read, tokenised, cut and filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.format.schema import Sample
from pipeline.data.bad_rows import BadRows
from pipeline.data.chats import ChatFormat
from pipeline.data.documents import load_documents
from pipeline.data.remembered import key_of, recall, remember
from pipeline.data.samples import MIN_TOKENS, LeftOut, make_samples
from pipeline.data.tokens import Tokenised, before_last_turn, tokenise_chats, tokenise_texts
from pipeline.errors import RequestError
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import Teacher


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples wanted, in order; what was left out; the text of --chat-template, where it was given.

    wanted: (id, length) of each sample. `samples` is empty where the store covers the request, and it was
    remembered which samples it asks for.
    Where texts are to be written, a prompt is what a sample begins with, up to `prompt_tokens`.
    """

    samples: list[Sample]
    left_out: LeftOut
    chat_template: str | None
    prompt_tokens: int | None = None
    wanted: Sequence[tuple[str, int]] = ()


def select(
    request: GenerateRequest,
    teacher: Teacher,
    tokenizer: Any,
    report: Reporter,
    covered: Callable[[Sequence[tuple[str, int]]], bool] = lambda wanted: False,
) -> Selection:
    """Read the data set and make samples of it.

    covered: whether a store lacks nothing of the samples, (id, length) each. Then they are not made again if
    it is remembered which they are.

    Raises:
        RequestError: anything about data set, tokenizer or chat template that the user has to fix.
    """
    documents = load_documents(
        request.dataset,
        request.split,
        request.dataset_config,
        text_column=request.text_column,
        messages_column=request.messages_column,
        shuffle_seed=request.shuffle_seed,
        listen=report.reading,
    )
    template = _template(request, documents.chats)
    max_seq_len = longest = request.sequence_length(teacher)
    if request.writing:
        longest = request.writing.longest_prompt(max_seq_len, documents.chats)
    key = key_of(request, teacher, tokenizer, template, documents.fingerprint())
    known = None if request.writing else recall(key)
    if known is not None and covered(known.wanted):
        if known.left_out.bad_rows:
            report.stage(f"dropped {known.left_out.bad_rows:,} bad rows")
        return Selection(samples=[], left_out=known.left_out, chat_template=template, wanted=known.wanted)
    learn_all = request.loss_on == "all" or not documents.chats
    bad = BadRows()
    values = bad.usable(documents.values)
    if documents.chats:
        form = ChatFormat(tokenizer, template, f"--chat-template {request.chat_template or 'of TEACHER'}")
        tokenised = tokenise_chats(
            chats=values,
            tokenizer=tokenizer,
            form=form,
            column=documents.column,
            learn_all=learn_all,
            bad=bad,
        )
    else:
        end = _end_of_sequence(tokenizer, "--append-eos") if request.append_eos else None
        texts = (text for _, text in values)
        tokenised = tokenise_texts(texts, tokenizer, end=end, open_end=request.writing is not None)
    if request.writing and documents.chats:
        tokenised, max_seq_len = map(before_last_turn, tokenised), longest
    report.stage(f"tokenising {request.dataset}")
    samples, left_out = _samples(
        request,
        bad,
        tokenised,
        report,
        max_seq_len=max_seq_len,
        vocab_size=teacher.vocab_size,
        num_samples=request.num_samples,
        min_seq_len=request.min_seq_len or MIN_TOKENS,
        # Half of a chat is no prompt.
        drop_long=request.long == "drop" or bool(request.writing and documents.chats),
        joiner=(_end_of_sequence(tokenizer, "--pack"), learn_all) if request.pack else None,
    )
    wanted = [(sample.id, len(sample)) for sample in samples]
    if not request.writing:
        remember(key, wanted, left_out)
    return Selection(
        samples=samples,
        left_out=left_out,
        chat_template=template,
        prompt_tokens=longest if request.writing else None,
        wanted=wanted,
    )


def _samples(
    request: GenerateRequest, bad: BadRows, tokenised: Iterable[Tokenised], report: Reporter, **how: Any
) -> tuple[list[Sample], LeftOut]:
    """Samples and what was left out; `bad` is filled while they are made, and decides at the end."""
    try:
        samples, left_out = make_samples(_counted(tokenised, report), **how)
    except RequestError as error:
        if request.bad_rows == "refuse":
            bad.refuse(request.dataset)
        dropped = f"; {bad.count:,} bad rows were dropped ({bad.first})" if bad.count else ""
        raise RequestError(f"{error}{dropped}") from error
    if request.bad_rows == "refuse":
        bad.refuse(request.dataset)
    if bad.count:
        report.stage(f"dropped {bad.count:,} bad rows: {bad.first}")
    left_out.bad_rows = bad.count
    return samples, left_out


def _counted(documents: Iterable[Tokenised], report: Reporter) -> Iterator[Tokenised]:
    """The same documents; `report` hears how many there have been, and of how many tokens."""
    tokens = 0
    for number, document in enumerate(documents, start=1):
        tokens += len(document.tokens)
        report.tokenised(number, tokens)
        yield document


def _template(request: GenerateRequest, chats: bool) -> str | None:
    """The text of --chat-template; flags about chats are refused where there are none."""
    if not chats:
        for flag, value in (("--chat-template", request.chat_template), ("--loss-on", request.loss_on)):
            if value not in (None, "all"):
                raise RequestError(f"{flag} {value}: {request.dataset} holds texts, no chats")
        return None
    if request.append_eos:
        raise RequestError("--append-eos: a chat ends as its chat template writes it; leave the flag out")
    if request.chat_template is None:
        return None
    try:
        return Path(request.chat_template).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"--chat-template {request.chat_template}: not UTF-8 text") from error
    except OSError as error:
        raise RequestError(f"--chat-template {request.chat_template}: {error.strerror}") from error


def _end_of_sequence(tokenizer: Any, flag: str) -> int:
    if tokenizer.eos_token_id is None:
        raise RequestError(
            f"{flag}: the teacher's tokenizer has no end-of-sequence token to put behind documents"
        )
    return int(tokenizer.eos_token_id)
