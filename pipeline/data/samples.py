"""From tokenised documents to samples: cut or pack to the sequence length, and leave out what is no use."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from featurestore.format.schema import Sample
from pipeline.data.tokens import Tokenised
from pipeline.errors import RequestError

_Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
# One token has no next token to be learned from.
MIN_TOKENS = 2


@dataclass
class LeftOut:
    """What did not become a sample, counted until the last sample asked for was found.

    empty: documents without a token of their own, and chats without a prompt to write on; too_long:
    documents over the longest sample, where those are not cut. The others are samples, after cutting or
    packing: too_short; nothing_learned: no token in them is learned from the one before it; duplicates:
    another sample has the same tokens and mask. bad_rows: rows that could not be used.
    """

    empty: int = 0
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

    def __add__(self, other: LeftOut) -> LeftOut:
        """Both together."""
        return LeftOut(
            **{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
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
    known: Container[str] = (),
) -> tuple[list[Sample], LeftOut]:
    """Samples of `min_seq_len` to `max_seq_len` tokens, in order, each with something to learn, none twice.

    Every document is cut into consecutive windows of its own, or left out if it is too long and `drop_long`.
    With `joiner`, a token and whether it is learned, documents are joined by it, and cut into windows that
    are all full but the last. Each window begins with the tokens that begin a text. A sample that several
    documents give is one, and names them all. Samples whose ids are `known` count as duplicates.

    Raises:
        RequestError: the tokenizer has ids that the teacher does not.
    """
    left_out = LeftOut()
    kept = _checked(documents, max_seq_len, drop_long, left_out)
    unique: dict[str, Sample] = {}
    keys: dict[str, dict[str, None]] = {}
    for window in packed(kept, *joiner, max_seq_len) if joiner else cut(kept, max_seq_len):
        if len(window.tokens) < min_seq_len or window.own < MIN_TOKENS:
            left_out.too_short += 1
        elif not window.learned[1:].any():
            left_out.nothing_learned += 1
        else:
            _check_ids(window.tokens, vocab_size)
            sample = Sample(tokens=window.tokens, loss_mask=window.learned)
            if sample.id in unique or sample.id in known:
                left_out.duplicates += 1
            if sample.id in known:
                continue
            unique.setdefault(sample.id, sample)
            keys.setdefault(sample.id, {}).update(dict.fromkeys(filter(None, window.documents)))
        if num_samples is not None and len(unique) >= num_samples:
            break
    samples = [replace(sample, documents=tuple(keys[name])) for name, sample in unique.items()]
    return samples, left_out


def no_sample(min_seq_len: int, left_out: LeftOut) -> RequestError:
    """What is said of a data set that no sample comes out of."""
    reasons = str(left_out) or "there is no document in it"
    return RequestError(
        f"DATASET: empty, no sample of at least {min_seq_len} tokens with one to learn comes out of it "
        f"({reasons})"
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """What may become a sample. tokens: int32 [T]; learned: bool [T]; documents: keys of what it is cut from,
    in order; own: tokens but for a prefix that stands there because a document was cut.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    documents: tuple[str, ...]
    own: int


def cut(documents: Iterable[Tokenised], size: int) -> Iterator[Window]:
    """Consecutive windows of at most `size` tokens of each document; all but its last are full.

    Windows after the first begin with the document's prefix too, which is not learned there.
    """
    for document in documents:
        yield _window([(document.tokens[:size], document.learned[:size])], [document.key])
        room = size - document.prefix
        for start in range(size, len(document.tokens), room):
            part = slice(start, start + room)
            parts = [_beginning(document), (document.tokens[part], document.learned[part])]
            yield _window(parts, [document.key], document.prefix)


def packed(documents: Iterable[Tokenised], joiner: int, learned: bool, size: int) -> Iterator[Window]:
    """All documents as one stream with `joiner` between those that it does not part already, cut into
    windows of `size` tokens; the last may be shorter.

    Where documents have a prefix, a window that begins inside a document begins with it, and none begins with
    the joiner. A prefix is not learned, but for a token of it that is the joiner too (BOS and EOS are one).
    """
    parts: list[_Part] = []
    keys: list[str] = []
    last, first_window, repeated = joiner, True, 0

    def filled() -> int:
        return sum(len(tokens) for tokens, _ in parts)

    for document in documents:
        if not len(document.tokens):
            continue
        first = int(document.tokens[0])
        if joiner not in (last, first) and (parts or not document.prefix):
            parts.append((np.array([joiner], np.int32), np.array([learned])))
        last = int(document.tokens[-1])
        if filled() == size:
            yield _window(parts, keys, repeated)
            parts, keys, first_window, repeated = [], [], False, 0
        mask = document.learned.copy()
        if parts or not first_window:
            mask[: document.prefix] = False
            mask[: bool(document.prefix and first == joiner and parts)] = learned
        at = 0
        while at < len(document.tokens):
            part = slice(at, at + size - filled())
            parts.append((document.tokens[part], mask[part]))
            keys.append(document.key)
            at = part.stop
            if filled() < size:
                break
            yield _window(parts, keys, repeated)
            parts, keys, first_window, repeated = [], [], False, 0
            if at <= document.prefix and at < len(document.tokens):
                at = 0  # The window ended inside what begins the document: it begins anew.
            elif at < len(document.tokens) and document.prefix:
                parts.append(_beginning(document))
                repeated = document.prefix
    if parts:
        yield _window(parts, keys, repeated)


def _beginning(document: Tokenised) -> _Part:
    """The prefix of a document, not learned."""
    return document.tokens[: document.prefix], np.zeros(document.prefix, np.bool_)


def _window(parts: Sequence[_Part], keys: Iterable[str], repeated: int = 0) -> Window:
    tokens, learned = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    documents = tuple(dict.fromkeys(keys))
    return Window(tokens=tokens, learned=learned, documents=documents, own=len(tokens) - repeated)


def _checked(
    documents: Iterable[Tokenised], size: int, drop_long: bool, left_out: LeftOut
) -> Iterator[Tokenised]:
    """Without empty documents, and without those of more than `size` tokens if `drop_long`."""
    for document in documents:
        if document.prefix >= size:
            raise RequestError(
                f"--max-seq-len {size}: the tokenizer puts {document.prefix} tokens in front of every "
                f"sample; give at least {document.prefix + 1}"
            )
        if not len(document.tokens):
            left_out.empty += 1
        elif drop_long and len(document.tokens) > size:
            left_out.too_long += 1
        else:
            yield document


def _check_ids(tokens: npt.NDArray[np.int32], vocab_size: int) -> None:
    if int(tokens.max()) >= vocab_size:
        raise RequestError(
            f"TEACHER: its tokenizer gives token {int(tokens.max())}, its vocabulary ends at "
            f"{vocab_size - 1}; the tokenizer and the model do not belong together"
        )
