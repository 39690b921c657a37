"""Several caches of the same samples by several teachers, or by one in several guises.

Samples are matched by their ids, which are hashes of tokens and loss mask: what matches is the same sequence,
and the same positions of it are learned. Everything counts in the numbers of the first cache; what another
one calls a sample is looked up once, 8 bytes for each sample of the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from featurestore.catalogue.views import Without
from featurestore.identity import canonical_json, digest
from featurestore.reader import CacheReader
from student.data.held_out import Split
from student.errors import UserError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CacheStores:
    """Open caches whose samples are matched; with one of them, all of its samples.

    weights: of the teachers in a mixture, 1 together; where they move in the course of a training, those at
    its end, of which one may be 0. partners: for each cache behind the first one, int64
    [samples of the first]: the index there, -1 where it does not hold the sample.
    """

    readers: tuple[CacheReader, ...]
    weights: tuple[float, ...] = (1.0,)
    partners: tuple[Indices, ...] = ()

    def __len__(self) -> int:
        return len(self.readers)

    @property
    def first(self) -> CacheReader:
        """The cache whose numbers count."""
        return self.readers[0]

    @property
    def manifests(self) -> tuple[str, ...]:
        """Digests of the manifests that are read."""
        return tuple(reader.manifest_digest for reader in self.readers)

    @property
    def names(self) -> tuple[str, ...]:
        """What objective files and records call the caches: the last part of where each lies, or all of it
        where that does not tell them apart.
        """
        paths = [str(reader.path) for reader in self.readers]
        ends = [PurePosixPath(path).name for path in paths]
        return tuple(ends if len(set(ends)) == len(ends) else paths)

    @property
    def mixture(self) -> str:
        """`0.5 a + 0.5 b`."""
        return " + ".join(f"{w:g} {name}" for w, name in zip(self.weights, self.names, strict=True) if w)

    def index(self, store: int, index: int) -> int:
        """What cache `store` calls sample `index` of the first one."""
        return index if store == 0 else int(self.partners[store - 1][index])

    def missing(self) -> Indices:
        """Samples of the first cache that another one lacks, ascending."""
        lacking = np.zeros(len(self.first), bool)
        for partner in self.partners:
            lacking |= partner < 0
        return np.flatnonzero(lacking).astype(np.int64)

    def __str__(self) -> str:
        """How many samples each holds, and how many match, in one line."""
        held = ", ".join(
            f"{name} {len(reader):,}" for name, reader in zip(self.names, self.readers, strict=True)
        )
        matched = len(self.first) - len(self.missing())
        return f"{len(self)} caches hold samples: {held}; {matched:,} are in all of them and are used"


def open_stores(
    paths: Sequence[str], manifests: Sequence[str | None], weights: Sequence[float] | None = None
) -> CacheStores:
    """Open caches and match their samples.

    Args:
        paths: of one cache or more.
        manifests: of each the digest to read, or how it begins; None for the fullest one.
        weights: of the teachers, at least 0, divided by their sum; None for equal ones.

    Raises:
        UserError: the weights are not as many as the caches, the teachers differ in tokenizer or vocabulary,
            or no sample is in all caches; the line says why.
        StoreNotFoundError: there is no cache.
    """
    shares = _shares(len(paths), weights)
    readers = [CacheReader.open(path, manifest) for path, manifest in zip(paths, manifests, strict=True)]
    for other, path in zip(readers[1:], paths[1:], strict=True):
        _check_alike(readers[0], other, paths[0], path)
    partners = tuple(_partners(readers[0], other) for other in readers[1:])
    stores = CacheStores(readers=tuple(readers), weights=shares, partners=partners)
    if len(stores) > 1 and len(stores.missing()) == len(stores.first):
        raise UserError(_why_none(readers, paths))
    return stores


def _shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    if weights is None:
        return (1.0 / count,) * count
    given = ",".join(f"{weight:g}" for weight in weights)
    if count == 1:
        raise UserError(
            f"--teacher-weights {given} has no effect on one STORE; leave it out, or give several"
        )
    if len(weights) != count:
        raise UserError(f"--teacher-weights {given}: {len(weights)} weights for {count} STOREs; give {count}")
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _check_alike(first: CacheReader, other: CacheReader, path: str, other_path: str) -> None:
    """UserError where the ids of one cache do not stand for the same text in another, or it is the same."""
    ours, theirs = first.identity, other.identity
    if (str(first.path), first.manifest_digest) == (str(other.path), other.manifest_digest):
        raise UserError(f"{other_path} is given twice; give caches of different teachers")
    if ours.tokenizer_digest != theirs.tokenizer_digest:
        raise UserError(
            f"{other_path}: its tokenizer ({theirs.tokenizer_digest[:12]}) is not that of {path} "
            f"({ours.tokenizer_digest[:12]}), so token ids stand for other text; several STOREs need "
            "teachers with one tokenizer"
        )
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"{other_path}: its teacher has {theirs.vocab_size:,} tokens and that of {path} "
            f"{ours.vocab_size:,}, so one gives probabilities to tokens that the other does not have; "
            "several STOREs need teachers with one vocabulary"
        )


def _partners(first: CacheReader, other: CacheReader) -> Indices:
    found = [other.catalogue.find(ids) for ids in first.sample_ids.parts()]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _why_none(readers: Sequence[CacheReader], paths: Sequence[str]) -> str:
    """Samples that match have the same tokens and mask: what may have kept all of them from it."""
    longest = [reader.lengths.max() for reader in readers]
    known = [_some_documents(reader) for reader in readers]
    what = f"no sample is in all of {', '.join(paths)}: samples match where tokens and loss mask are the same"
    if not all(known):
        why = "the data or their cutting differ"
    elif set.intersection(*known):
        why = "their documents are the same, but cut into samples or masked otherwise"
    else:
        why = "they share no document of those that were looked at"
    lengths = " and ".join(f"{length:,}" for length in longest)
    return (
        f"{what}; {why} (the longest samples have {lengths} tokens); run `distily-cache generate` for each "
        "teacher with the same data, --max-seq-len and --loss-on"
    )


def _some_documents(reader: CacheReader) -> set[bytes]:
    """Keys of documents of the first segment."""
    keys = reader.catalogue.documents(0)[1] if reader.catalogue.segments else ()
    return {bytes(key) for key in keys}


def order_digest(manifests: Sequence[str]) -> str:
    """What the order of samples follows from, 32 hex digits: the manifest of one cache, else all of them."""
    return manifests[0] if len(manifests) == 1 else digest(canonical_json(list(manifests)))


def matched(split: Split, stores: CacheStores) -> Split:
    """The split of the first cache without the samples that another one lacks, so that a sample is on the
    side on which it is with one teacher.

    Raises:
        UserError: nothing is left on a side.
    """
    if len(stores) == 1:
        return split
    missing = stores.missing()
    assert isinstance(split.training, Without)
    training = Without(split.training.total, np.union1d(split.training.excluded, missing))
    kept = ~np.isin(np.asarray(split.held_out, np.int64), missing)
    if not len(training) or (split.held_out and not kept.any()):
        side = "held-out" if len(training) else "training"
        raise UserError(
            f"--eval-fraction leaves no {side} sample of the {len(stores.first) - len(missing):,} that are "
            "in all STOREs; choose another fraction (0 holds nothing out), or caches that share more samples"
        )
    return replace(
        split,
        training=training,
        held_out=[index for index, keep in zip(split.held_out, kept.tolist(), strict=True) if keep],
        held_out_documents=[
            number for number, keep in zip(split.held_out_documents, kept.tolist(), strict=True) if keep
        ],
    )
