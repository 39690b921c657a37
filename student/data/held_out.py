"""Which samples are held out: a pure function of each sample's documents, so that no document is on both
sides, and that a growing cache never moves a sample from one side to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.catalogue.views import Without
from featurestore.reader import CacheReader
from student.errors import UserError

_HASH_DIGITS = 16
_HASH_RANGE: int = 16**_HASH_DIGITS

Array = npt.NDArray[Any]
_NONE = np.zeros(0, np.int64)


# One segment of a cache: ids uint8 [n, 16], where each sample's keys begin int64 [n + 1], keys uint8 [., 8].
Part = tuple[Array, Array, Array]
# A further task that holds a sample: index of the sample, its id in hex, its documents' keys there.
Copy = tuple[int, str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of training and held-out samples, in the order of the cache. Only the samples that are not
    trained on take memory.

    held_out_documents: of each held-out sample, see `number_documents`.
    left_out: how many are on neither side, since they share a document with the held-out side. unknown: how
    many samples have no document's key (caches of before, imported ones) and are split on their own.
    """

    training: Sequence[int]
    held_out: list[int]
    held_out_documents: list[int] = field(default_factory=list)
    left_out: int = 0
    unknown: int = 0

    def __str__(self) -> str:
        """What the user should know, in one line; empty where every sample is on a side by its document."""
        said = []
        if self.left_out:
            said.append(f"{self.left_out:,} samples are left out: they share a document with held-out ones")
        if self.unknown:
            said.append(
                f"{self.unknown:,} samples do not name their documents and are split one by one, so held-out "
                "ones may come from documents that are trained on"
            )
        return "; ".join(said)


def is_held_out(key: str, fraction: float) -> bool:
    """Whether what `key` names is on the held-out side; a hex hash, uniform by construction."""
    return int(key[:_HASH_DIGITS], 16) < fraction * _HASH_RANGE


def split_parts(
    count: int, parts: Callable[[], Iterable[Part]], copies: Sequence[Copy], fraction: float
) -> Split:
    """The two sides; fraction 0 holds nothing out.

    A sample is held out with the document that it begins in, or by its own id where that is not known. One
    that is not held out is trained on unless a held-out sample has a part of one of its documents.

    count: samples of all parts. parts: gives them anew each time, in order. copies: of samples that are in
    more than one task.

    UserError when a side that must not be empty is.
    """
    if not fraction:
        return Split(training=Without(count, ()), held_out=[])
    # Two generators, or two stores that were merged, can have found one sample in different documents. Where
    # these are on different sides, it is on none: either would move it for one who had one of them only.
    others: dict[int, list[tuple[str, tuple[str, ...]]]] = {}
    for index, sample, keys in copies:
        others.setdefault(index, []).append((sample, keys))
    held_out, mixed, names, held_keys, unknown = _held_side(parts(), others, fraction)
    shared = _sharing(parts(), others, held_keys)
    excluded = np.unique(np.concatenate([held_out, mixed, shared]))
    if not len(held_out) or len(excluded) == count:
        raise UserError(_empty_side(count, fraction, parts(), "training" if len(held_out) else "held-out"))
    return Split(
        training=Without(count, excluded),
        held_out=held_out.tolist(),
        held_out_documents=number_documents(names, {}),
        left_out=len(excluded) - len(held_out),
        unknown=unknown,
    )


def split_cache(reader: CacheReader, fraction: float) -> Split:
    """`split_parts` of a cache."""
    catalogue = reader.catalogue

    def parts() -> Iterator[Part]:
        for number in range(catalogue.segments):
            segment = catalogue.segment(number)
            start, keys = catalogue.documents(number)
            ids = segment.columns["sample"]
            if not len(segment.dropped):
                yield ids, start, keys
                continue
            places = np.asarray(segment.kept)
            counts = np.diff(start)[places]
            ends = np.cumsum(counts)
            picked = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
                start[places] - (ends - counts), counts
            )
            yield ids[places], np.concatenate([[0], ends]), keys[picked]

    return split_parts(len(reader), parts, reader.copies() if fraction else (), fraction)


def _held_side(
    parts: Iterable[Part], others: Mapping[int, Sequence[tuple[str, tuple[str, ...]]]], fraction: float
) -> tuple[Array, Array, list[tuple[str, tuple[str, ...]]], Array, int]:
    """Held-out samples, those that are on both sides, of the first id and a document's keys, all keys of
    documents of which held-out samples have a part, and how many samples do not know theirs.
    """
    limit = math.ceil(fraction * _HASH_RANGE)
    held: list[Array] = [_NONE]
    mixed: list[int] = []
    names: list[tuple[str, tuple[str, ...]]] = []
    held_keys: list[Array] = [np.zeros(0, np.uint64)]
    first, unknown = 0, 0
    for ids, start, raw in parts:
        keys = _numbers(raw)
        known = np.diff(start) > 0
        begin = _numbers(ids[:, :8])
        begin[known] = keys[start[:-1][known]]
        out = begin < np.uint64(limit) if limit < _HASH_RANGE else np.ones(len(ids), bool)
        named = known.copy()
        own = {index: copies for index, copies in others.items() if first <= index < first + len(ids)}
        for index, copies in own.items():
            sides = {is_held_out(keys_[0] if keys_ else sample, fraction) for sample, keys_ in copies}
            named[index - first] &= all(keys_ for _, keys_ in copies)
            if sides != {bool(out[index - first])}:
                mixed.append(index)
                out[index - first] = False
        unknown += int((~named).sum())
        places = np.flatnonzero(out)
        held.append(places + first)
        held_keys.append(np.unique(keys[np.repeat(out, np.diff(start))]))
        for place in places.tolist():
            here = tuple(bytes(key).hex() for key in raw[start[place] : start[place] + 1])
            copied = [keys_ for _, keys_ in own.get(first + place, ())]
            if copied:
                held_keys.append(_numbers(_raw(copied)))
            names.append((bytes(ids[place]).hex(), next(filter(None, [here, *copied]), ())))
        first += len(ids)
    return (
        np.concatenate(held),
        np.array(mixed, np.int64),
        names,
        np.unique(np.concatenate(held_keys)),
        unknown,
    )


def _sharing(
    parts: Iterable[Part], others: Mapping[int, Sequence[tuple[str, tuple[str, ...]]]], held_keys: Array
) -> Array:
    """The samples that have a part of a document of which a held-out sample has one, too."""
    found: list[Array] = [_NONE]
    first = 0
    for ids, start, raw in parts:
        touched = np.concatenate([[0], np.cumsum(_within(_numbers(raw), held_keys))])
        found.append(np.flatnonzero(touched[start[1:]] > touched[start[:-1]]) + first)
        first += len(ids)
    for index, copies in others.items():
        if _within(_numbers(_raw([keys for _, keys in copies])), held_keys).any():
            found.append(np.array([index]))
    return np.concatenate(found)


def _within(values: Array, ascending: Array) -> Array:
    if not len(ascending):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    inside: Array = ascending[place] == values
    return inside


def _numbers(raw: Array) -> Array:
    """uint64 [n] of uint8 [n, 8]: what the hex digits of a key say."""
    return np.ascontiguousarray(raw).view(">u8").reshape(-1).astype(np.uint64)


def _raw(keys: Iterable[Iterable[str]]) -> Array:
    return np.frombuffer(bytes.fromhex("".join(key for some in keys for key in some)), np.uint8).reshape(
        -1, 8
    )


def split_between(trained: CacheReader, evaluated: CacheReader) -> Split:
    """All samples of one cache are trained on, all of another are held out.

    UserError for samples of another teacher or tokenizer, and where a sample is in both: its metrics would be
    those of what was learned by heart.
    """
    ours, theirs = trained.identity, evaluated.identity
    for what, own, other in (
        ("teacher", ours.digest, theirs.digest),
        ("tokenizer", ours.tokenizer_digest, theirs.tokenizer_digest),
    ):
        if own != other:
            raise UserError(
                f"eval_dataset: its {what} ({other[:12]}) is not that of train_dataset ({own[:12]}); give a "
                "cache of the same teacher"
            )
    shared = sum(int((trained.catalogue.find(part) >= 0).sum()) for part in evaluated.sample_ids.parts())
    if shared:
        raise UserError(
            f"eval_dataset: {shared:,} of its {len(evaluated):,} samples are in train_dataset, too; "
            "give a cache of other texts, or leave it out and hold samples out by args.eval_fraction"
        )
    documents = ((next(filter(None, known), ())) for known in evaluated.documents())
    return Split(
        training=range(len(trained)),
        held_out=list(range(len(evaluated))),
        held_out_documents=number_documents(zip(evaluated.sample_ids, documents, strict=True), {}),
    )


def number_documents(samples: Iterable[tuple[str, tuple[str, ...]]], numbers: dict[str, int]) -> list[int]:
    """A number per sample, of which the id and the keys of its documents are given: equal where samples begin
    in one document. A sample whose document is not known has a number of its own.

    numbers: those given so far by name; new ones are added.
    """
    return [numbers.setdefault(keys[0] if keys else sample_id, len(numbers)) for sample_id, keys in samples]


def _empty_side(count: int, fraction: float, parts: Iterable[Part], side: str) -> str:
    documents = len(np.unique(np.concatenate([_numbers(raw) for _, _, raw in parts])))
    whole = f", which come from {documents:,} documents that are not divided" if documents else ""
    return (
        f"--eval-fraction {fraction:g} leaves no {side} sample of the {count} in this cache"
        f"{whole}; choose another fraction (0 holds nothing out), or extend the cache with "
        f"{'more documents' if documents else '`distily-cache generate --num-samples`'}"
    )
