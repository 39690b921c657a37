"""A look inside a store: how the teacher's mass falls with rank, and one sample position by position."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.errors import MissingFeatureError
from featurestore.format.codec import head_mass, row_starts
from featurestore.format.schema import LogitsFeatures
from featurestore.format.tail import van_der_corput
from featurestore.reader import CacheReader

# What `survey` reads at most: so many samples, and no further one after so many head entries (about a
# second of decoding).
MAX_SAMPLES = 64
MAX_ENTRIES = 2**23


@dataclass(frozen=True, kw_only=True)
class RankMass:
    """How the stored heads spread their mass: from `samples` samples (of `of` in the store) with `rows` rows
    that are learned from, those whose next token is in the loss mask.

    ranks: 1, 2, 4, ... and the widest head. Per rank: probability, the mean over the rows of the probability
    at that rank (0 where a head ends before); cumulative, the mean mass of the ranks up to it; reached, the
    share of rows whose head is that wide.
    """

    samples: int
    of: int
    rows: int
    ranks: list[int]
    probability: list[float]
    cumulative: list[float]
    reached: list[float]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Survey:
    """What the rows of some samples look like that are learned from, R rows in all.

    head_sizes: uint16 [R]; entropy: float32 [R], nats, NaN where unknown; label_logprob: float32 [R], nats,
    NaN where unknown.
    """

    ranks: RankMass
    head_sizes: npt.NDArray[np.uint16]
    entropy: npt.NDArray[np.float32]
    label_logprob: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RowView:
    """What the teacher said at one position of a sample.

    token: the id there; next_token: the id that follows, with its probability (both None at the end).
    learned: the loss mask. best: (id, probability), by descending probability. head_mass: probability inside
    the stored head. entropy: nats. A number that the store does not know is None.
    """

    position: int
    token: int
    learned: bool
    next_token: int | None
    probability: float | None
    best: list[tuple[int, float]]
    head_mass: float
    entropy: float | None


@dataclass(frozen=True)
class SampleView:
    """The first rows of a sample of `length` positions."""

    index: int
    id: str
    length: int
    rows: list[RowView]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def survey(reader: CacheReader, limit: int = MAX_SAMPLES) -> Survey:
    """Look at up to `limit` samples that are spread evenly over the store, as far as MAX_ENTRIES allows.

    Raises MissingFeatureError when not every sample has logits or none of them is learned from,
    CorruptionError for damaged data.
    """
    spec = reader.find("logits")
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    entries = 0
    mass, reached = np.zeros(0), np.zeros(0)
    # Any start of the van der Corput sequence is spread over the store, wherever the limit falls.
    spread = (van_der_corput(limit) * len(reader)).astype(int).tolist()
    for index in dict.fromkeys(spread):
        sample = reader.read(index, [spec])
        head = sample.features[spec]
        assert isinstance(head, LogitsFeatures)
        learned = np.append(sample.loss_mask[1:], False)
        inside = np.repeat(learned, head.counts)
        starts = row_starts(head.counts)[:-1]
        rank = (np.arange(len(head.logits)) - np.repeat(starts, head.counts))[inside]
        p = np.exp(head.logits.astype(np.float64) - np.repeat(head.lse, head.counts))[inside]
        mass = _added(mass, np.bincount(rank, weights=p))
        reached = _added(reached, np.bincount(rank))
        parts.append((head.counts[learned], head.entropy[learned], head.label_logprob[learned]))
        entries += len(head.logits)
        if entries >= MAX_ENTRIES:
            break
    counts, entropy, label_logprob = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not len(counts):
        raise MissingFeatureError(f"no position of {len(parts)} samples is learned from")
    return Survey(
        _rank_mass(mass, reached, len(counts), len(parts), len(reader)), counts, entropy, label_logprob
    )


def mass_by_rank(reader: CacheReader) -> RankMass:
    """How much of the teacher's distribution its most probable tokens hold, by rank: means over the learned
    positions of samples that are spread over the store.

    Args:
        reader: an open store.

    Returns:
        `ranks`, which are 1, 2, 4, ... and the widest head, and for each of them `probability`, the mean at
        that rank, and `cumulative`, the mean of the mass of all ranks up to it.

    Raises:
        MissingFeatureError: not every sample has logits, or none is learned from.
        CorruptionError: the bytes are not those that were committed.

    Example:
        mass = mass_by_rank(reader)
        dict(zip(mass.ranks, mass.cumulative))
    """
    return survey(reader).ranks


def _rank_mass(
    mass: npt.NDArray[np.float64], reached: npt.NDArray[np.float64], rows: int, samples: int, of: int
) -> RankMass:
    ranks = [*(2**i for i in range(len(mass).bit_length()) if 2**i < len(mass)), len(mass)]
    places = np.array(ranks) - 1
    return RankMass(
        samples=samples,
        of=of,
        rows=rows,
        ranks=ranks,
        probability=(mass / rows)[places].tolist(),
        cumulative=(mass.cumsum() / rows)[places].tolist(),
        reached=(reached / rows)[places].tolist(),
    )


def look_at(reader: CacheReader, index: int, limit: int, best: int = 5) -> SampleView:
    """The first `limit` rows of sample `index`, each with its `best` most probable tokens.

    Raises IndexError for an index outside the store, MissingFeatureError when not every sample has logits.
    """
    spec = reader.find("logits")
    sample = reader.read(index, [spec])
    head = sample.features[spec]
    assert isinstance(head, LogitsFeatures)
    starts, mass = row_starts(head.counts), head_mass(head.counts, head.logits, head.lse)
    rows = []
    for t in range(min(limit, len(sample.tokens))):
        top = slice(starts[t], min(starts[t] + best, starts[t + 1]))
        probabilities = np.exp(head.logits[top].astype(np.float64) - head.lse[t]).tolist()
        rows.append(
            RowView(
                position=t,
                token=int(sample.tokens[t]),
                learned=bool(sample.loss_mask[t]),
                next_token=int(sample.tokens[t + 1]) if t + 1 < len(sample.tokens) else None,
                probability=_known(math.exp(head.label_logprob[t])),
                best=list(zip(head.ids[top].tolist(), probabilities, strict=True)),
                head_mass=float(mass[t]),
                entropy=_known(float(head.entropy[t])),
            )
        )
    return SampleView(index, sample.id, len(sample.tokens), rows)


def _added(total: np.ndarray[Any, Any], more: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sum of two histograms of different lengths."""
    out = np.zeros(max(len(total), len(more)))
    out[: len(total)] += total
    out[: len(more)] += more
    return out


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number
