"""From tokenised documents to samples: cut or pack to the sequence length, and leave out what is no use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from featurestore.schema import Sample
from pipeline.errors import RequestError
from pipeline.tokens import Tokenised

# One token has no next token to be learned from.
MIN_TOKENS = 2


@dataclass
class LeftOut:
    """What did not become a sample, counted until the last sample asked for was found.

    too_long: documents over the longest sample, where those are not cut. The others are samples, after
    cutting or packing: too_short; nothing_learned: no token in them is learned from the one before it;
    duplicates: another sample has the same tokens and mask. bad_rows: rows that could not be used.
    """

    too_short: int = 0
    too_long: int = 0
    nothing_learned: int = 0
    duplicates: int = 0
    bad_rows: int = 0

    def __str__(self) -> str:
        """In words, without what is zero: `3 too short, 1 duplicates`; empty when nothing was left out."""
        return ", ".join(
            f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(self).items() if count
        )


def make_samples(
    documents: Iterable[Tokenised],
    *,
    max_seq_len: int,
    vocab_size: int,
    num_samples: int | None = None,
    min_seq_len: int = MIN_TOKENS,
    drop_long: bool = False,
    joiner: tuple[int, bool] | None = None,
) -> tuple[list[Sample], LeftOut]:
    """Samples of `min_seq_len` to `max_seq_len` tokens, in order, each with something to learn, none twice.

    Every document is cut into consecutive windows of its own, or left out if it is too long and `drop_long`.
    With `joiner`, a token and whether it is learned, documents are joined by it, and cut into windows that
    are all full but the last.

    Raises:
        RequestError: no sample comes out, or the tokenizer has ids that the teacher does not.
    """
    left_out = LeftOut()
    kept = _without_long(documents, max_seq_len, left_out) if drop_long else documents
    unique: dict[str, Sample] = {}
    for tokens, learned in packed(kept, *joiner, max_seq_len) if joiner else cut(kept, max_seq_len):
        if len(tokens) < max(min_seq_len, MIN_TOKENS):
            left_out.too_short += 1
        elif not learned[1:].any():
            left_out.nothing_learned += 1
        else:
            _check_ids(tokens, vocab_size)
            sample = Sample(tokens=tokens, loss_mask=learned)
            if sample.id in unique:
                left_out.duplicates += 1
            unique.setdefault(sample.id, sample)
        if num_samples is not None and len(unique) >= num_samples:
            break
    if not unique:
        reasons = str(left_out) or "there is no document in it"
        raise RequestError(
            f"DATASET: empty, no sample of at least {max(min_seq_len, MIN_TOKENS)} tokens with one to learn "
            f"comes out of it ({reasons})"
        )
    return list(unique.values()), left_out


def cut(documents: Iterable[Tokenised], size: int) -> Iterator[Tokenised]:
    """Consecutive windows of `size` tokens of each document; its last may be shorter, or empty."""
    for tokens, learned in documents:
        for start in range(0, max(len(tokens), 1), size):
            yield tokens[start : start + size], learned[start : start + size]


def packed(documents: Iterable[Tokenised], joiner: int, learned: bool, size: int) -> Iterator[Tokenised]:
    """All documents as one stream with `joiner` between those that it does not part already, cut into
    windows of `size` tokens; the last may be shorter.
    """
    between: Tokenised = (np.array([joiner], np.int32), np.array([learned]))
    rest: Tokenised = (np.empty(0, np.int32), np.empty(0, np.bool_))
    last = joiner
    for document in documents:
        if not len(document[0]):
            continue
        parts = [rest, document] if joiner in (last, int(document[0][0])) else [rest, between, document]
        last = int(document[0][-1])
        tokens, mask = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        full = len(tokens) - len(tokens) % size
        if full:
            yield from cut([(tokens[:full], mask[:full])], size)
        rest = tokens[full:], mask[full:]
    if len(rest[0]):
        yield rest


def _without_long(documents: Iterable[Tokenised], size: int, left_out: LeftOut) -> Iterator[Tokenised]:
    for document in documents:
        if len(document[0]) > size:
            left_out.too_long += 1
        else:
            yield document


def _check_ids(tokens: np.typing.NDArray[np.int32], vocab_size: int) -> None:
    if int(tokens.max()) >= vocab_size:
        raise RequestError(
            f"TEACHER: its tokenizer gives token {int(tokens.max())}, its vocabulary ends at "
            f"{vocab_size - 1}; the tokenizer and the model do not belong together"
        )
