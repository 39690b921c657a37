"""Documents as tokens, with the loss mask: which tokens are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.schema import document_key
from pipeline.data.bad_rows import BadRows, RowError
from pipeline.data.chats import ChatFormat, Message, Spans, check_messages
from pipeline.errors import RequestError

# Where a conversation stands, its messages, and the text that the template makes of them, perhaps with spans.
_Written = tuple[str, list[Message], Any]

_BATCH_DOCUMENTS = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenised:
    """A document as tokens. tokens: int32 [T]; learned: bool [T], which of them are learned.

    prefix: how many of the first tokens begin a text (BOS of most tokenizers); every window of the document
    begins with them. key: see `featurestore.format.schema.document_key`; empty where it is not known.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    prefix: int = 0
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The token ids that a tokenizer puts in front of a text and behind it."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> Surroundings:
        """Those of a tokenizer of transformers."""
        whole, body = (_encode(tokenizer, ["a"], add_special_tokens=s)["input_ids"][0] for s in (True, False))
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return cls(prefix=tuple(whole[:start]), suffix=tuple(whole[start + len(body) :]))
        return cls()


def tokenise_texts(
    texts: Iterable[str], tokenizer: Any, *, end: int | None = None, open_end: bool = False
) -> Iterator[Tokenised]:
    """The tokens of each text with what the tokenizer puts around a text; all are learned but what begins it.

    An empty text has no tokens at all. end: a token that follows each text which does not end with it
    already. open_end: leave out what the tokenizer puts behind a text, since something will be written there.
    """
    around = Surroundings.of(tokenizer)
    for batch in _batches(texts):
        for text, encoded in zip(batch, _ids(tokenizer, batch), strict=True):
            empty = len(encoded) <= len(around.prefix) + len(around.suffix)
            ids = [] if empty else _closed(encoded, around, end, open_end)
            learned = np.ones(len(ids), np.bool_)
            # Nothing is left of the first token to learn it from: its place in the mask means nothing.
            learned[1 : len(around.prefix)] = False
            yield Tokenised(
                tokens=np.asarray(ids, np.int32),
                learned=learned,
                prefix=len(around.prefix),
                key=document_key(text),
            )


def _closed(ids: list[int], around: Surroundings, end: int | None, open_end: bool) -> list[int]:
    if open_end and around.suffix:
        return ids[: -len(around.suffix)]
    return [*ids, end] if end is not None and ids[-1] != end else ids


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
    if not learn_all and not tokenizer.is_fast:
        raise RequestError(
            "--loss-on assistant: the teacher's tokenizer does not say where its tokens are in the text; "
            "give --loss-on all"
        )
    write = form.text if learn_all else form.text_and_spans
    beginnings = _beginnings(tokenizer)
    for rows in _batches(_written(chats, write, column, bad)):
        for (_, messages, _), (tokens, learned) in _chat_tokens(rows, tokenizer, learn_all, bad):
            prefix = next((len(p) for p in beginnings if tuple(tokens[: len(p)].tolist()) == p), 0)
            learned[1:prefix] = False
            yield Tokenised(tokens=tokens, learned=learned, prefix=prefix, key=document_key(messages))


def _beginnings(tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens with which a template may begin a text, as the tokenizer does or with BOS alone."""
    found = [Surroundings.of(tokenizer).prefix]
    if tokenizer.bos_token_id is not None:
        found.append((tokenizer.bos_token_id,))
    return [tokens for tokens in found if tokens]


def _chat_tokens(
    rows: list[_Written], tokenizer: Any, learn_all: bool, bad: BadRows | None
) -> Iterator[tuple[_Written, tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]]:
    """Tokens and mask of each conversation whose assistant's tokens are known for certain."""
    if learn_all:
        found = _encode(tokenizer, [text for _, _, text in rows], add_special_tokens=False)["input_ids"]
        for row, ids in zip(rows, found, strict=True):
            yield row, (np.asarray(ids, np.int32), np.ones(len(ids), np.bool_))
        return
    texts = [text for _, _, (text, _) in rows]
    encoded = _encode(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        place, _, (text, spans) = row
        try:
            mask = assistant_mask(tokenizer, text, spans, ids, offsets)
        except ValueError as error:
            reason = f"{error}; correct the row, give another --chat-template, or --loss-on all"
            _leave_out(RowError(f"DATASET {place}: {reason}"), bad)
        else:
            yield row, (np.asarray(ids, np.int32), mask)


def _written(
    chats: Iterable[tuple[str, Any]],
    write: Callable[[list[Message], str], Any],
    column: str,
    bad: BadRows | None,
) -> Iterator[_Written]:
    """Each conversation that is well formed, and what `write` makes of it."""
    for where, value in chats:
        try:
            messages = check_messages(value, where, column)
            yield where, messages, write(messages, where)
        except RowError as error:
            _leave_out(error, bad)


def _leave_out(error: RowError, bad: BadRows | None) -> None:
    if bad is None:
        raise error from None
    bad.add(str(error))


def before_last_turn(chat: Tokenised) -> Tokenised:
    """What stands before the assistant's last turn, which the template opens there; nothing without one."""
    learned = chat.learned
    last = int(np.flatnonzero(learned)[-1]) if learned.any() else 0
    first = int(np.flatnonzero(~learned[:last])[-1]) + 1 if not learned[:last].all() else 0
    return replace(chat, tokens=chat.tokens[:first], learned=np.ones(first, np.bool_))


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
                f"the tokenizer joins the assistant's text ({text[start:end][:20]!r}…) with the chat "
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


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, with what the tokenizer puts around it.

    Where transformers only hands texts to its backend, so do we, and spare it the offsets: a quarter of the
    time.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not (
        tokenizer.is_fast
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    ):
        ids: list[list[int]] = _encode(tokenizer, texts)["input_ids"]
        return ids
    _encode(tokenizer, ["a"])  # the backend is set to neither cut nor pad
    return [encoded.ids for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


def _encode(tokenizer: Any, texts: list[str], **options: bool) -> Any:
    # verbose=False: documents longer than the model are expected here, they are cut afterwards.
    return tokenizer(texts, truncation=False, padding=False, verbose=False, **options)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(items)
    while batch := list(islice(stream, _BATCH_DOCUMENTS)):
        yield batch
