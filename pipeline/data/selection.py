"""The samples of a request: its data set read, tokenised, cut and filtered, a portion at a time."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data import portions as pieces
from pipeline.data.bad_rows import BadRows
from pipeline.data.cutting import Cut, Cutter, Cutting, MakePool, PortionPool, here, result_of
from pipeline.data.documents import Documents, load_documents
from pipeline.data.portions import Portion, portions
from pipeline.data.remembered import Memory
from pipeline.data.samples import MIN_TOKENS, LeftOut, no_sample
from pipeline.errors import RequestError
from pipeline.progress import Reporter
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import Teacher

# Whether a store lacks nothing of these samples, (id, length) each.
Covered = Callable[[Sequence[tuple[str, int]]], bool]
# So many samples are known again when another portion has them, too.
_SAMPLES_KNOWN = 2**16


@dataclass
class Tally:
    """What was found in a data set so far."""

    samples: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    bad: BadRows = field(default_factory=BadRows)


class Selection:
    """The samples wanted, in order, a portion of the data set at a time.

    first: what came out of the first portion. complete: there is no other; most data sets are that small,
    and all is known of them before anything is computed. tally: of what was read so far. chat_template: the
    text of --chat-template, where it was given. prompt_tokens: where texts are to be written, a prompt is
    what a sample begins with, up to so many.
    """

    def __init__(
        self,
        request: GenerateRequest,
        cutting: Cutting,
        documents: Documents,
        tokenizer: Any,
        report: Reporter,
        prompt_tokens: int | None,
        pool: MakePool,
        portion_size: int,
    ) -> None:
        self._request, self._cutting, self._documents, self._report = request, cutting, documents, report
        self._tokenizer, self._memory = tokenizer, Memory(cutting, tokenizer)
        self._limit, self._pool, self._portion_size = request.num_samples, pool, portion_size
        self.chat_template, self.prompt_tokens = cutting.template, prompt_tokens
        self.tally = Tally()
        self.first, self.complete = Cut(wanted=[]), False
        # Of the documents, how much the first portion is; None where that is not known.
        self.first_share: float | None = None

    def begin(self, covered: Covered) -> None:
        """Read the first portion and make samples of it, unless a store is known to lack none of them."""
        reading = self._portions()  # kept, so that it is open while it is asked how far it is
        portion = next(reading)
        self.first_share = 1.0 if portion.last else self._documents.share()
        reading.close()
        key = self._memory.key_of(portion.values)
        known = self._memory.recall(key, self._limit)
        if known is None or not covered(known.wanted) or (known.bad.count and not self._drops):
            self._report.stage(f"tokenising {self._request.dataset}")
            cutter = Cutter(self._cutting, self._tokenizer, self._report.tokenised)
            known = cutter.cut(portion.values, self._limit)
            self._remember(key, known)
        self.first = known
        self._count(known)
        self.complete = portion.last or self.tally.samples == self._limit
        if self.complete:
            self._end()

    def cuts(self, covered: Covered) -> Iterator[Cut]:
        """What comes out of each portion, from the first on. May be asked for again.

        Portions are cut by other processes, some of them ahead. covered: see `begin`.

        Raises:
            RequestError: there are rows that cannot be used, and they are not to be dropped, or no sample
                comes out of the whole data set.
        """
        if self.complete:
            yield self.first
            return
        with self._pool(self._cutting, self._tokenizer, self._request.tensor_parallel_size) as pool:
            yield from self._new_ones(pool, covered)
        self._end()

    def _new_ones(self, pool: PortionPool, covered: Covered) -> Iterator[Cut]:
        """The samples that were not seen before, and no more than are wanted."""
        known: OrderedDict[str, None] = OrderedDict()
        self.tally = Tally()
        for portion, made in self._in_order(pool, covered):
            cut = made if portion is None else self._new(portion, made, known, pool)
            known.update(dict.fromkeys(name for name, _ in cut.wanted))
            while len(known) > _SAMPLES_KNOWN:
                known.popitem(last=False)
            self._count(cut)
            yield cut
            if self.tally.samples == self._limit:
                break

    def all(self) -> Cut:
        """All samples at once."""
        found = list(self.cuts(lambda _: False))
        return Cut(
            wanted=[one for cut in found for one in cut.wanted],
            samples={name: sample for cut in found for name, sample in cut.samples.items()},
            left_out=self.tally.left_out,
            bad=self.tally.bad,
        )

    @property
    def _drops(self) -> bool:
        return self._request.bad_rows == "drop"

    def _portions(self) -> Generator[Portion]:
        return portions(self._documents.values, self._portion_size)

    def _in_order(self, pool: PortionPool, covered: Covered) -> Iterator[tuple[Portion | None, Cut]]:
        """(None, the first cut), then each portion and its cut; some are in the making meanwhile."""
        made: deque[tuple[Portion | None, str, Cut | Future[Cut]]] = deque([(None, "", self.first)])
        for portion in islice(self._portions(), 1, None):
            key = self._memory.key_of(portion.values)
            known = self._memory.recall(key)
            usable = known is not None and (self._drops or not known.bad.count)
            if known is not None and usable and covered(known.wanted):
                made.append((portion, key, known))
            else:
                made.append((portion, key, pool.submit(portion.values)))
            if len(made) > pool.depth:
                yield self._taken(*made.popleft())
        while made:
            yield self._taken(*made.popleft())

    def _taken(
        self, portion: Portion | None, key: str, made: Cut | Future[Cut]
    ) -> tuple[Portion | None, Cut]:
        if isinstance(made, Cut):
            return portion, made
        cut = result_of(made)
        self._memory.remember(key, cut)
        return portion, cut

    def _new(self, portion: Portion, cut: Cut, known: OrderedDict[str, None], pool: PortionPool) -> Cut:
        """The samples of a portion that are not `known`, and no more than are still wanted."""
        wanted = [one for one in cut.wanted if one[0] not in known]
        missing = None if self._limit is None else self._limit - self.tally.samples
        if missing is not None and len(wanted) > missing:
            return result_of(pool.submit(portion.values, missing, known))
        double = LeftOut(duplicates=len(cut.wanted) - len(wanted))
        return replace(cut, wanted=wanted, left_out=cut.left_out + double)

    def _remember(self, key: str, cut: Cut) -> None:
        if self._limit is None or len(cut.wanted) < self._limit:
            self._memory.remember(key, cut)

    def _count(self, cut: Cut) -> None:
        """RequestError where a portion has rows that cannot be used and are not to be dropped."""
        tally = self.tally
        tally.samples += len(cut.wanted)
        tally.left_out += cut.left_out
        tally.bad = tally.bad + cut.bad
        if not self._drops:
            tally.bad.refuse(self._request.dataset)

    def _end(self) -> None:
        """Say at the end of the data set what was dropped; RequestError where nothing is left."""
        bad = self.tally.bad
        because = f": {bad.first}" * bool(bad.reasons)
        if not self.tally.samples:
            dropped = f"; {bad.count:,} bad rows were dropped ({bad.first})" if bad.count else ""
            error = no_sample(self._cutting.min_seq_len, replace(self.tally.left_out, bad_rows=0))
            raise RequestError(f"{error}{dropped}")
        if bad.count:
            self._report.stage(f"dropped {bad.count:,} bad rows{because}")


def select(
    request: GenerateRequest,
    teacher: Teacher,
    tokenizer: Any,
    report: Reporter,
    covered: Covered = lambda wanted: False,
    pool: MakePool = here,
    portion_size: int | None = None,
) -> Selection:
    """Read the first portion of the data set, the whole of it where it is small, and make samples of it.

    covered: whether a store lacks nothing of some samples. Then they are not made again if it is remembered
    which they are. pool: what cuts the portions behind the first.

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
        streaming=request.streaming,
        listen=report.reading,
    )
    template = _template(request, documents.chats)
    max_seq_len = longest = request.sequence_length(teacher)
    if request.writing:
        longest = request.writing.longest_prompt(max_seq_len, documents.chats)
    prompts = bool(request.writing and documents.chats)
    cutting = Cutting(
        teacher=teacher,
        trust_remote_code=request.trust_remote_code,
        chats=documents.chats,
        column=documents.column,
        template=template,
        template_flag=f"--chat-template {request.chat_template or 'of TEACHER'}",
        learn_all=request.loss_on == "all" or not documents.chats,
        end=_end_of_sequence(tokenizer, "--append-eos") if request.append_eos else None,
        open_end=request.writing is not None,
        prompts=prompts,
        joiner=_end_of_sequence(tokenizer, "--pack") if request.pack else None,
        min_seq_len=request.min_seq_len or MIN_TOKENS,
        max_seq_len=longest if prompts else max_seq_len,
        # Half of a chat is no prompt.
        drop_long=request.long == "drop" or prompts,
    )
    prompt_tokens = longest if request.writing else None
    size = portion_size or pieces.PORTION_SIZE
    selection = Selection(request, cutting, documents, tokenizer, report, prompt_tokens, pool, size)
    selection.begin(covered)
    return selection


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
