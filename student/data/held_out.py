"""Which samples are held out: a pure function of each sample's documents, so that no document is on both
sides, and that a growing cache never moves a sample from one side to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from featurestore.reader import CacheReader
from student.errors import UserError

_HASH_DIGITS = 16
_HASH_RANGE: int = 16**_HASH_DIGITS

# Of a sample: the keys of its documents, once for each task of the cache that holds it.
Documents = Sequence[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of training and held-out samples, in the order of the cache.

    held_out_documents: of each held-out sample, see `number_documents`.
    left_out: how many are on neither side, since they share a document with the held-out side. unknown: how
    many samples have no document's key (caches of before, imported ones) and are split on their own.
    """

    training: list[int]
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


def split_samples(
    sample_ids: Sequence[str], fraction: float, documents: Sequence[Documents] | None = None
) -> Split:
    """The two sides; fraction 0 holds nothing out.

    documents: per sample, see `CacheReader.documents`; None: not known of any. A sample is held out with the
    document that it begins in, or by its own id where that is not known. One that is not held out is trained
    on unless a held-out sample has a part of one of its documents.

    UserError when a side that must not be empty is.
    """
    copies: Sequence[Documents] = documents if documents is not None else [()] * len(sample_ids)
    sides = [
        {is_held_out(keys[0] if keys else sample_id, fraction) for keys in known or [()]}
        for sample_id, known in zip(sample_ids, copies, strict=True)
    ]
    # Two generators, or two stores that were merged, can have found one sample in different documents. Where
    # these are on different sides, it is on none: either would move it for one who had one of them only.
    held_out = [index for index, side in enumerate(sides) if side == {True}]
    held_keys = {key for index in held_out for keys in copies[index] for key in keys}
    training = [
        index
        for index, side in enumerate(sides)
        if side == {False} and not any(key in held_keys for keys in copies[index] for key in keys)
    ]
    if not training or (fraction > 0 and not held_out):
        raise UserError(_empty_side(sample_ids, fraction, copies, "held-out" if training else "training"))
    return Split(
        training=training,
        held_out=held_out,
        held_out_documents=number_documents(
            ((sample_ids[index], next(filter(None, copies[index]), ())) for index in held_out), {}
        ),
        left_out=len(sample_ids) - len(training) - len(held_out),
        unknown=sum(not all(known or [()]) for known in copies) if fraction else 0,
    )


def split_cache(reader: CacheReader, fraction: float) -> Split:
    """`split_samples` of a cache."""
    if not fraction:
        return split_samples(reader.sample_ids, 0)
    return split_samples(reader.sample_ids, fraction, reader.documents())


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
    shared = set(trained.sample_ids) & set(evaluated.sample_ids)
    if shared:
        raise UserError(
            f"eval_dataset: {len(shared):,} of its {len(evaluated):,} samples are in train_dataset, too; "
            "give a cache of other texts, or leave it out and hold samples out by args.eval_fraction"
        )
    documents = ((next(filter(None, known), ())) for known in evaluated.documents())
    return Split(
        training=list(range(len(trained))),
        held_out=list(range(len(evaluated))),
        held_out_documents=number_documents(zip(evaluated.sample_ids, documents, strict=True), {}),
    )


def number_documents(samples: Iterable[tuple[str, tuple[str, ...]]], numbers: dict[str, int]) -> list[int]:
    """A number per sample, of which the id and the keys of its documents are given: equal where samples begin
    in one document. A sample whose document is not known has a number of its own.

    numbers: those given so far by name; new ones are added.
    """
    return [numbers.setdefault(keys[0] if keys else sample_id, len(numbers)) for sample_id, keys in samples]


def _empty_side(sample_ids: Sequence[str], fraction: float, copies: Sequence[Documents], side: str) -> str:
    names = {key for known in copies for keys in known for key in keys}
    whole = f", which come from {len(names):,} documents that are not divided" if names else ""
    return (
        f"--eval-fraction {fraction:g} leaves no {side} sample of the {len(sample_ids)} in this cache"
        f"{whole}; choose another fraction (0 holds nothing out), or extend the cache with "
        f"{'more documents' if names else '`distily-cache generate --num-samples`'}"
    )
