"""Documents as tokens, with the loss mask: which tokens are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bad_rows import BadRows, RowError
from pipeline.chats import ChatFormat, Message, Spans, check_messages
from pipeline.errors import RequestError

# Token ids, int32 [T], and whether each is learned, bool [T].
Tokenised = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]

_BATCH_DOCUMENTS = 64


def tokenise_texts(texts: Iterable[str], tokenizer: Any) -> Iterator[Tokenised]:
    """The tokens of each text with what the tokenizer puts around a text; all are learned."""
    for batch in _batches(texts):
        yield from map(_all_learned, _encode(tokenizer, batch)["input_ids"])


def tokenise_chats(
    chats: Iterable[tuple[str, Any]],
    tokenizer: Any,
    form: ChatFormat,
    column: str,
    learn_all: bool,
    bad: BadRows | None = None,
) -> Iterator[Tokenised]:
    """The tokens of each conversation as `form` writes it; those of the assistant are learned, or all.

    The template writes the tokens that begin a text, so the tokenizer adds none. A conversation that is
    malformed, that the template refuses, or whose assistant's tokens are not known for certain, is counted in
    `bad` and left out.

    Raises:
        RowError: there is such a conversation, and no `bad`.
        RequestError: the template is no Jinja, or the tokenizer does not say where its tokens are.
    """
    if learn_all:
        texts = _written(chats, form.text, column, bad)
        for batch in _batches(text for _, text in texts):
            yield from map(_all_learned, _encode(tokenizer, batch, add_special_tokens=False)["input_ids"])
        return
    if not tokenizer.is_fast:
        raise RequestError(
            "--loss-on assistant: the teacher's tokenizer does not say where its tokens are in the text; "
            "give --loss-on all"
        )
    for rows in _batches(_written(chats, form.text_and_spans, column, bad)):
        texts_of_batch = [text for _, (text, _) in rows]
        found = _encode(tokenizer, texts_of_batch, add_special_tokens=False, return_offsets_mapping=True)
        for (place, (text, spans)), ids, offsets in zip(
            rows, found["input_ids"], found["offset_mapping"], strict=True
        ):
            try:
                mask = assistant_mask(tokenizer, text, spans, ids, offsets)
            except ValueError as error:
                reason = f"{error}; correct the row, give another --chat-template, or --loss-on all"
                _leave_out(RowError(f"DATASET {place}: {reason}"), bad)
            else:
                yield np.asarray(ids, np.int32), mask


def _written(
    chats: Iterable[tuple[str, Any]],
    write: Callable[[list[Message], str], Any],
    column: str,
    bad: BadRows | None,
) -> Iterator[tuple[str, Any]]:
    """What `write` makes of each conversation that is well formed."""
    for where, value in chats:
        try:
            yield where, write(check_messages(value, where, column), where)
        except RowError as error:
            _leave_out(error, bad)


def _leave_out(error: RowError, bad: BadRows | None) -> None:
    if bad is None:
        raise error from None
    bad.add(str(error))


def before_last_turn(chat: Tokenised) -> Tokenised:
    """What stands before the assistant's last turn, which the template opens there; nothing without one."""
    tokens, learned = chat
    last = int(np.flatnonzero(learned)[-1]) if learned.any() else 0
    first = int(np.flatnonzero(~learned[:last])[-1]) + 1 if not learned[:last].all() else 0
    return tokens[:first], np.ones(first, np.bool_)


def assistant_mask(
    tokenizer: Any, text: str, spans: Spans, ids: list[int], offsets: list[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    """The tokens of `spans`, ranges of characters of `text`: bool [T]. They are decoded again to make sure.

    offsets: the characters [start, end) of each token. A token that also holds white space beside a span is
    the span's.

    Raises:
        ValueError: a token holds characters of a span and others, or the tokens do not decode to its text.
    """
    mask = np.zeros(len(ids), np.bool_)
    bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
    for (start, end), (first, last) in zip(spans, token_spans(text, spans, bounds), strict=True):
        _check_decoded(tokenizer, text[start:end], ids[first:last])
        mask[first:last] = True
    return mask


def token_spans(text: str, spans: Spans, bounds: npt.NDArray[np.int64]) -> Spans:
    """The tokens [first, last) of each range of characters; bounds int64 [T, 2]: those of each token.

    Raises:
        ValueError: a token holds characters of a span and others that are not white space.
    """
    starts, ends = bounds[:, 0], bounds[:, 1]
    found: Spans = []
    for start, end in spans:
        # Byte-level tokenizers give white space without a width, at its end.
        inside = (ends > start) & np.where(ends > starts, starts < end, ends <= end)
        where = np.flatnonzero(inside)
        if not len(where) or start == end:
            found.append((0, 0))
            continue
        first, last = int(where[0]), int(where[-1]) + 1
        around = text[int(starts[first:last].min()) : start] + text[end : int(ends[first:last].max())]
        if around.strip():
            raise ValueError(
                f"the tokenizer joins what the assistant says ({text[start:end][:20]!r}…) with the chat "
                f"template's {around!r} in one token"
            )
        found.append((first, last))
    return found


def _check_decoded(tokenizer: Any, said: str, ids: list[int]) -> None:
    """ValueError unless `ids` decode to `said`, white space aside, or to what the tokenizer keeps of it."""

    def decoded(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return _without_space(text)

    if decoded(ids) == _without_space(said):
        return
    if decoded(ids) != decoded(_encode(tokenizer, [said], add_special_tokens=False)["input_ids"][0]):
        raise ValueError(f"the tokens found for the assistant do not decode to what it says ({said[:20]!r}…)")


def _without_space(text: str) -> str:
    return "".join(text.split())


def _all_learned(ids: list[int]) -> Tokenised:
    return np.asarray(ids, np.int32), np.ones(len(ids), np.bool_)


def _encode(tokenizer: Any, texts: list[str], **options: bool) -> Any:
    # verbose=False: documents longer than the model are expected here, they are cut afterwards.
    return tokenizer(texts, truncation=False, padding=False, verbose=False, **options)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(items)
    while batch := list(islice(stream, _BATCH_DOCUMENTS)):
        yield batch
