"""What every layout is read into, and how that becomes a sample and its features.

T positions of a document, N head entries of all positions together, one position after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featurestore.format.codec import MAX_DROP, STEPS_PER_NAT
from featurestore.format.schema import MAX_TOP_K, LogitsFeatures, Sample
from pipeline.errors import RequestError

Array = npt.NDArray[Any]

IGNORED_LABEL = -100
# Below this our codec stores a probability of zero; peers pad with -inf, -1e9 or null.
LEAST_LOGPROB = -MAX_DROP / STEPS_PER_NAT
# A head whose mass is that near to one, or above it, holds all of it: no more is in float32 inputs.
ROUNDING = 1e-6
# Sums above one by more than this are not rounding but lossy compression, and are counted.
EXCESS = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class Document:
    """One text with the teacher's distributions, as a data set has them.

    tokens: int64 [T]. learned: bool [T], which tokens are labels. counts: int64 [T], head entries of position
    t, which describe the token at t + 1; 0 where there is no distribution. ids: int64 [N]; logprobs: float64
    [N], natural, in any order; what is not finite is padding.
    """

    tokens: Array
    learned: Array
    counts: Array
    ids: Array
    logprobs: Array


class Layout(Protocol):
    """How one kind of data set is read. `columns`: those that it needs of it."""

    columns: list[str]

    def documents(self, row: Any) -> Iterator[Document]:
        """The documents of one row (a pyarrow Table of one row); more than one when it is packed."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Imported:
    """A document as the store takes it, and what was done to it.

    renormalised: rows whose probabilities summed to more than one. unknown: positions without a distribution,
    of T. fits: float64 [3], the probability that row t gives to the tokens at t, t + 1 and t + 2, summed.
    """

    sample: Sample
    features: LogitsFeatures
    renormalised: int
    unknown: int
    fits: Array


def to_imported(document: Document, vocab_size: int, where: str) -> Imported:
    """Clean the heads, close those above one, and mark what nothing is known of as not learned.

    A position without a distribution is stored as the least that a row can say: token 0 with the probability
    1 / vocab_size, and nothing of the rest. Raises RequestError for token ids outside the vocabulary.
    """
    tokens = document.tokens
    length = len(tokens)
    row, ids, logprobs = _clean(document, vocab_size, where)
    mass = np.bincount(row, np.exp(logprobs), minlength=length)
    closed = mass > 1 - ROUNDING
    # Up by the rounding of float32, so that the stored mass is one and not a little less.
    shift = np.where(closed, np.log(np.where(closed, mass, 1.0)) - ROUNDING, 0.0)
    logprobs = logprobs - shift[row]
    fits = np.array([_probability(row, ids, logprobs, tokens, ahead) for ahead in range(3)])
    counts = np.bincount(row, minlength=length)
    if counts.max(initial=0) > MAX_TOP_K:
        raise RequestError(
            f"DATASET {where}: a position with {counts.max():,} tokens; a store keeps {MAX_TOP_K:,} at most"
        )
    unknown = counts == 0
    learned = document.learned.copy()
    learned[1:] &= ~unknown[:-1]
    label = np.full(length, np.nan, np.float32)
    is_label = ids == _following(tokens, 1)[row]
    label[row[is_label]] = logprobs[is_label]
    # Fill the gaps, and bring the rows into order again.
    row = np.concatenate([row, np.flatnonzero(unknown)])
    order = np.argsort(row, kind="stable")
    ids = np.concatenate([ids, np.zeros(unknown.sum(), np.int64)])[order]
    logprobs = np.concatenate([logprobs, np.full(unknown.sum(), -np.log(vocab_size))])[order]
    features = LogitsFeatures(
        counts=np.maximum(counts, 1).astype(np.uint16),
        ids=ids.astype(np.uint32),
        logits=logprobs.astype(np.float32),
        lse=np.zeros(length, np.float32),
        label_logprob=label,
        entropy=np.full(length, np.nan, np.float32),
    )
    return Imported(
        sample=Sample(tokens.astype(np.int32), learned),
        features=features,
        renormalised=int((mass > 1 + EXCESS).sum()),
        unknown=int(unknown.sum()),
        fits=fits,
    )


def split_packed(document: Document, attention: Array | None) -> Iterator[Document]:
    """The documents of a packed row: runs of one value in the attention mask; zeros are padding."""
    if attention is None:
        yield document
        return
    if len(attention) != len(document.tokens):
        raise RequestError("DATASET: an attention_mask of another length than input_ids")
    starts = np.concatenate([[0], document.counts.cumsum()])
    cuts = [0, *(np.flatnonzero(np.diff(attention)) + 1).tolist(), len(attention)]
    for start, stop in pairwise(cuts):
        if stop > start and attention[start]:
            entries = slice(starts[start], starts[stop])
            yield Document(
                tokens=document.tokens[start:stop],
                learned=document.learned[start:stop],
                counts=document.counts[start:stop],
                ids=document.ids[entries],
                logprobs=document.logprobs[entries],
            )


def flat(row: Any, name: str) -> Array | None:
    """The list in a column of a one-row table as a flat array; None when column or value is missing."""
    if name not in row.column_names or not row.column(name)[0].is_valid:
        return None
    values = row.column(name).combine_chunks().flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False))


def nested(row: Any, name: str) -> tuple[Array, Array]:
    """The list of lists in a column of a one-row table: lengths int64 [T], values [N]; null is NaN."""
    inner = row.column(name).combine_chunks().flatten()
    lengths = [0 if one is None else one for one in _lengths(inner)]
    return np.asarray(lengths, dtype=np.int64), inner.flatten().to_numpy(zero_copy_only=False)


def learned_tokens(row: Any, tokens: Array) -> Array:
    """bool [T]: the tokens that `labels` repeats; all of them without that column."""
    labels = flat(row, "labels")
    if labels is None:
        return np.ones(len(tokens), dtype=np.bool_)
    if len(labels) != len(tokens):
        raise RequestError("DATASET: labels of another length than input_ids")
    return np.asarray(labels != IGNORED_LABEL)


def _lengths(inner: Any) -> list[int | None]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(inner.type):
        return [inner.type.list_size if valid else None for valid in inner.is_valid().to_pylist()]
    return list(inner.value_lengths().to_pylist())


def _clean(document: Document, vocab_size: int, where: str) -> tuple[Array, Array, Array]:
    """(row, id, log-probability) of every real entry, descending inside a row, each id once."""
    row = np.repeat(np.arange(len(document.tokens)), document.counts)
    real = np.isfinite(document.logprobs) & (document.logprobs > LEAST_LOGPROB)
    row, ids, logprobs = row[real], document.ids[real].astype(np.int64), document.logprobs[real]
    for found in (ids, document.tokens):
        if len(found) and not 0 <= found.min() <= found.max() < vocab_size:
            beyond = int(found.max() if found.max() >= vocab_size else found.min())
            raise RequestError(
                f"DATASET {where}: token id {beyond}, but TEACHER's vocabulary ends at {vocab_size - 1}; "
                "they do not belong together, or --layout or --compression do not fit"
            )
    order = np.lexsort((-logprobs, row))
    row, ids, logprobs = row[order], ids[order], logprobs[order]
    first = np.sort(np.unique(row * vocab_size + ids, return_index=True)[1])
    return row[first], ids[first], logprobs[first]


def _following(tokens: Array, ahead: int) -> Array:
    """int64 [T]: the token `ahead` positions on, -1 where there is none."""
    following = np.full(len(tokens), -1, dtype=np.int64)
    following[: len(tokens) - ahead] = tokens[ahead:] if ahead < len(tokens) else following[:0]
    return following


def _probability(row: Array, ids: Array, logprobs: Array, tokens: Array, ahead: int) -> float:
    """The probability that the rows give to the tokens `ahead` of them, summed."""
    return float(np.exp(logprobs[ids == _following(tokens, ahead)[row]]).sum())
