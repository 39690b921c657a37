"""From documents to samples: tokenise, then cut or pack to the sequence length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from featurestore.schema import Sample
from pipeline.errors import RequestError

_BATCH_DOCUMENTS = 64
# One token has no next token to be learned from.
MIN_TOKENS = 2


def make_samples(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    max_seq_len: int,
    vocab_size: int,
    pack: bool = False,
    num_samples: int | None = None,
) -> list[Sample]:
    """Tokenise `documents` into samples of at most `max_seq_len` tokens, in order, without duplicates.

    Without `pack` every document is cut into consecutive windows of its own. With `pack` documents are joined
    by the end-of-sequence token and cut into windows that are all full but the last.

    Raises:
        RequestError: no sample comes out, or the tokenizer has ids that the teacher does not.
    """
    tokenised = _tokenise(documents, tokenizer)
    streams: Iterator[Iterable[int]] = tokenised
    if pack:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise RequestError(
                "--pack: the teacher's tokenizer has no end-of-sequence token to join documents with"
            )
        streams = iter([_joined(tokenised, eos)])
    windows = chain.from_iterable(cut(stream, max_seq_len) for stream in streams)
    unique: dict[str, Sample] = {}
    for window in windows:
        tokens = np.asarray(window, dtype=np.int32)
        if int(tokens.max()) >= vocab_size:
            raise RequestError(
                f"TEACHER: its tokenizer gives token {int(tokens.max())}, its vocabulary ends at "
                f"{vocab_size - 1}; the tokenizer and the model do not belong together"
            )
        sample = Sample(tokens=tokens, loss_mask=np.ones(len(tokens), dtype=np.bool_))
        unique.setdefault(sample.id, sample)
        if num_samples is not None and len(unique) >= num_samples:
            break
    if not unique:
        raise RequestError(f"DATASET: empty, no text of at least {MIN_TOKENS} tokens in it")
    return list(unique.values())


def cut(tokens: Iterable[int], size: int) -> Iterator[list[int]]:
    """Consecutive windows of `size` tokens; a rest shorter than `MIN_TOKENS` is dropped."""
    stream = iter(tokens)
    while len(window := list(islice(stream, size))) >= MIN_TOKENS:
        yield window


def _joined(documents: Iterator[Sequence[int]], eos: int) -> Iterator[int]:
    """All documents as one stream of tokens with `eos` between them."""
    for index, tokens in enumerate(documents):
        if index and tokens and tokens[0] != eos:
            yield eos
        yield from tokens


def _tokenise(documents: Iterable[str], tokenizer: Any) -> Iterator[Sequence[int]]:
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH_DOCUMENTS)):
        # verbose=False: documents longer than the model are expected here, they are cut afterwards.
        yield from tokenizer(batch, truncation=False, padding=False, verbose=False)["input_ids"]
