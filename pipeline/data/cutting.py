"""Documents into samples: tokenised, cut or packed, filtered. In this process, or in others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Protocol

from distily.system.command_line import quiet_libraries
from featurestore.format.schema import Sample
from pipeline.data.bad_rows import BadRows
from pipeline.data.chats import ChatFormat
from pipeline.data.samples import LeftOut, make_samples
from pipeline.data.tokens import Tokenised, before_last_turn, tokenise_chats, tokenise_texts
from pipeline.errors import PipelineError
from pipeline.teacher.checkpoint import Teacher
from pipeline.teacher.tokenizer import load_tokenizer

_MOST_PROCESSES = 8
# Told how many documents were tokenised, and into how many tokens.
Listener = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """All that samples are made of beside the documents.

    chats: the documents are conversations, in `column`; template: the text of --chat-template, None for the
    tokenizer's own, and template_flag names it in an error. learn_all: every token is learned. end: a token
    that is put behind each text. open_end: something will be written behind a text. prompts: a chat is cut
    before its last turn. joiner: the token that documents are packed with.
    """

    teacher: Teacher
    trust_remote_code: bool
    chats: bool
    column: str
    template: str | None
    template_flag: str
    learn_all: bool
    end: int | None
    open_end: bool
    prompts: bool
    joiner: int | None
    min_seq_len: int
    max_seq_len: int
    drop_long: bool


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What came out of a portion: (id, length) of each sample, in order, the samples by id, and what did not
    become one. `samples` is empty where the store lacks nothing of them.
    """

    wanted: Sequence[tuple[str, int]]
    samples: dict[str, Sample] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    bad: BadRows = field(default_factory=BadRows)


class Cutter:
    """Makes samples of documents as `cutting` says."""

    def __init__(self, cutting: Cutting, tokenizer: Any, listen: Listener = lambda *_: None) -> None:
        self._cutting, self._tokenizer, self._listen = cutting, tokenizer, listen
        self._documents = self._tokens = 0
        self._form: ChatFormat | None = None
        if cutting.chats:
            self._form = ChatFormat(tokenizer, cutting.template, cutting.template_flag)

    def cut(
        self, values: Iterable[tuple[str, Any]], limit: int | None = None, known: Container[str] = ()
    ) -> Cut:
        """The samples of a portion, `limit` at most; those that are `known` are duplicates.

        Raises:
            RequestError: the tokenizer does not belong to the model, or what it is asked for it cannot do.
        """
        how, bad = self._cutting, BadRows()
        samples, left_out = make_samples(
            self._counted(self._tokenised(bad.usable(values), bad)),
            max_seq_len=how.max_seq_len,
            vocab_size=how.teacher.vocab_size,
            num_samples=limit,
            min_seq_len=how.min_seq_len,
            drop_long=how.drop_long,
            joiner=None if how.joiner is None else (how.joiner, how.learn_all),
            known=known,
        )
        left_out.bad_rows = bad.count
        return Cut(
            wanted=[(sample.id, len(sample)) for sample in samples],
            samples={sample.id: sample for sample in samples},
            left_out=left_out,
            bad=bad,
        )

    def _tokenised(self, values: Iterable[tuple[str, Any]], bad: BadRows) -> Iterable[Tokenised]:
        how = self._cutting
        if self._form is None:
            texts = (text for _, text in values)
            return tokenise_texts(texts, self._tokenizer, end=how.end, open_end=how.open_end)
        chats = tokenise_chats(
            chats=values,
            tokenizer=self._tokenizer,
            form=self._form,
            column=how.column,
            learn_all=how.learn_all,
            bad=bad,
        )
        return map(before_last_turn, chats) if how.prompts else chats

    def _counted(self, documents: Iterable[Tokenised]) -> Iterator[Tokenised]:
        for document in documents:
            self._documents += 1
            self._tokens += len(document.tokens)
            self._listen(self._documents, self._tokens)
            yield document


class PortionPool(Protocol):
    """Cuts portions beside the rest of a command. depth: portions that it wants to be given ahead."""

    depth: int

    def submit(
        self, values: Sequence[tuple[str, Any]], limit: int | None = None, known: Container[str] = ()
    ) -> Future[Cut]: ...
    def __enter__(self) -> PortionPool: ...
    def __exit__(self, *_: object) -> None: ...


# Of a cutting, its tokenizer, and how many cores the engine needs.
MakePool = Callable[[Cutting, Any, int], PortionPool]


class CuttingPool:
    """Cuts portions beside the rest of a command, in processes that have one thread each, or without any in a
    thread of this process.

    Processes are started when the first portion is handed in. A thread is enough where the machine has no
    core to spare: tokenizers let others work meanwhile, and so does what else takes long.
    """

    def __init__(self, cutting: Cutting, tokenizer: Any, processes: int) -> None:
        self.depth = max(processes, 1) + 1
        self._pool: Executor
        if processes:
            spawned = get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, spawned, initializer=_begin, initargs=(cutting,))
            self._cut = _cut
        else:
            self._pool = ThreadPoolExecutor(1, "tokenise")
            self._cut = Cutter(cutting, tokenizer).cut

    def submit(
        self, values: Sequence[tuple[str, Any]], limit: int | None = None, known: Container[str] = ()
    ) -> Future[Cut]:
        """Have a portion cut; see `Cutter.cut`."""
        return self._pool.submit(self._cut, values, limit, known)

    def __enter__(self) -> CuttingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def here(cutting: Cutting, tokenizer: Any, engine_cores: int) -> CuttingPool:
    """The pool of this machine: a process for each core that the engine and this process leave, up to 8."""
    spare = len(os.sched_getaffinity(0)) - engine_cores - 1
    return CuttingPool(cutting, tokenizer, min(max(spare, 0), _MOST_PROCESSES))


def result_of(future: Future[Cut]) -> Cut:
    """What a process of the pool has made of a portion.

    Raises:
        RequestError: as of `Cutter.cut`.
        PipelineError: the process died.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PipelineError("a process that tokenises died; the same command resumes") from error


_cutter: Cutter | None = None


def _begin(cutting: Cutting) -> None:
    """One of the processes: load what it needs."""
    global _cutter  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that started it ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    quiet_libraries(quiet=True)
    _cutter = Cutter(cutting, load_tokenizer(cutting.teacher, cutting.trust_remote_code))


def _cut(values: Iterable[tuple[str, Any]], limit: int | None = None, known: Container[str] = ()) -> Cut:
    assert _cutter is not None
    return _cutter.cut(values, limit, known)
