"""The distribution of each position: its exact top, draws from the rest, and numbers of the whole row.

R rows (positions of all samples of a task), S samples, N head entries of all rows, M tail draws of a row, U
distinct token ids of a task, T positions of a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore.errors import CorruptionError
from featurestore.format.arrays import ChunkCache, ShardArray
from featurestore.format.codec import (
    ODDS_STEPS,
    ROW_STEPS,
    STEPS_PER_NAT,
    encode_entropy,
    encode_head,
    encode_labels,
    encode_rows,
    head_mass,
    row_starts,
)
from featurestore.format.codes import LogitsCodes, count_repeats
from featurestore.format.columns import ArrayLayout, Extent, Stats, compressed
from featurestore.format.kinds.arrow import IDS, NUMBERS, lists
from featurestore.format.kinds.base import Array, GroupKind, ReadSample
from featurestore.format.schema import NO_DRAW, LogitsFeatures, LogitsSpec, Sample, TeacherIdentity
from featurestore.format.states.transform import Basis
from featurestore.identity import check_int

_ENTRIES_PER_CHUNK = 16_384
# The list of them is read whole.
_MAX_DISTINCT_IDS = 2**24

# Of a position on disk: head size and mass, lse, label logprob, entropy; measured in
# benchmarks/store_size.py, as are the bytes of a head entry (an id and a coded logit) and of a tail draw.
_ROW_BYTES = 7
_ENTRY_BYTES = 1.9
_DRAW_BYTES = 1.3


class LogitsKind(GroupKind[LogitsSpec, LogitsFeatures, LogitsCodes]):
    """Heads as indexes into the task's own list of ids, in CSR form; see docs/FORMAT.md."""

    name = "logits"
    ids = "logits"
    spec = LogitsSpec
    # entries and distinct_ids are sizes of arrays.
    stats = ("entries", "distinct_ids", "labels", "head_mass", "label_logprob", "entropy")

    def covers(self, have: LogitsSpec, want: LogitsSpec) -> bool:
        if have.partial and not want.partial:
            return False
        if want.tail:
            # Draws exclude the head that they were made for, so that a narrower one is another distribution.
            return have.tail >= want.tail and replace(have, tail=want.tail) == want
        wide = have.top_p is None or (want.top_p is not None and have.top_p >= want.top_p)
        return have.top_k >= want.top_k and wide

    def width(self, spec: LogitsSpec) -> tuple[float, ...]:
        """A distribution with a tail is the unbiased one."""
        return not spec.partial, spec.tail > 0, spec.top_k, spec.top_p or 1.0, spec.tail

    def flag(self, kind: str) -> str | None:
        return "--top-k K" if kind == "logits" else None

    def check(self, spec: LogitsSpec, one: Any, length: int, identity: TeacherIdentity) -> None:
        if not isinstance(one, LogitsFeatures):
            raise ValueError(f"expected LogitsFeatures, not {type(one).__name__}")
        one.check(length)
        _check_rows(spec, one, identity.vocab_size)

    def layouts(self, spec: LogitsSpec, extent: Extent) -> dict[str, ArrayLayout]:
        rows, entries = (extent.rows,), (extent.entries,)
        index = _unsigned(extent.distinct_ids)
        in_rows = {"steps_per_nat": ROW_STEPS}
        in_heads = {"steps_per_nat": STEPS_PER_NAT}
        arrays = {
            "vocabulary": compressed((extent.distinct_ids,), _unsigned(extent.vocab_size)),
            "head_count": compressed(rows, _count_type(spec)),
            "head_index": compressed(entries, index, _ENTRIES_PER_CHUNK),
            "head_gaps": compressed(entries, np.uint16, _ENTRIES_PER_CHUNK, in_heads),
            "head_odds": compressed(rows, np.int16, attributes={"steps_per_nat": ODDS_STEPS}),
            "lse": compressed(rows, np.int32, attributes=in_rows),
            "label_logprob": compressed(rows, np.uint32, attributes=in_rows),
            "entropy": compressed(rows, np.uint16, attributes=in_rows),
            "sample_offsets": compressed((extent.samples + 1,), np.int64),
        }
        if spec.tail:
            chunk = max(1, _ENTRIES_PER_CHUNK // spec.tail)
            arrays["tail_index"] = compressed((extent.rows, spec.tail), index, chunk)
        return arrays

    def pack(
        self, spec: LogitsSpec, features: Sequence[LogitsFeatures], identity: TeacherIdentity
    ) -> tuple[dict[str, Array], Stats]:
        counts, ids, logits, lse, label_logprob, entropy = (
            np.concatenate([getattr(f, name) for f in features])
            for name in ("counts", "ids", "logits", "lse", "label_logprob", "entropy")
        )
        tails = [f.tail_ids for f in features if f.tail_ids is not None]
        # A row without draws repeats its own top id, which no draw can be.
        tops = ids[row_starts(counts)[:-1]].astype(np.int64)
        draws = np.concatenate(tails) if tails else np.zeros((len(counts), 0), dtype=np.int64)
        draws = np.where(draws == NO_DRAW, tops[:, None], draws)
        vocabulary, place = _vocabulary(np.concatenate([ids, draws.ravel()]), identity.vocab_size)
        index = _unsigned(len(vocabulary))
        gaps, odds = encode_head(counts, logits, lse)
        offsets = np.zeros(len(features) + 1, dtype=np.int64)
        np.cumsum([len(f.ids) for f in features], out=offsets[1:])
        arrays = {
            "vocabulary": vocabulary.astype(_unsigned(identity.vocab_size)),
            "head_count": counts.astype(_count_type(spec)),
            "head_index": place[ids].astype(index),
            "head_gaps": gaps,
            "head_odds": odds,
            "lse": encode_rows(lse, np.int32),
            "label_logprob": encode_labels(label_logprob),
            "entropy": encode_entropy(entropy),
            "sample_offsets": offsets,
        }
        if tails:
            arrays["tail_index"] = np.diff(np.sort(place[draws], axis=1), axis=1, prepend=0).astype(index)
        labels = label_logprob[~np.isnan(label_logprob)].astype(np.float64)
        stats: Stats = {
            "entries": len(logits),
            "distinct_ids": len(vocabulary),
            "labels": len(labels),
            "head_mass": float(head_mass(counts, logits, lse).sum()),
            "label_logprob": float(labels.sum()),
            "entropy": float(np.nansum(entropy, dtype=np.float64)),
        }
        return arrays, stats

    def check_stats(self, spec: LogitsSpec, stats: Stats, rows: int, where: str) -> None:
        check_int(stats["entries"], rows, rows * spec.top_k, f"{where}: entries")
        check_int(stats["labels"], 0, rows, f"{where}: labels")
        most = min(rows * (spec.top_k + spec.tail), _MAX_DISTINCT_IDS)
        check_int(stats["distinct_ids"], 1, most, f"{where}: distinct_ids")

    def open(
        self,
        spec: LogitsSpec,
        directory: Path,
        extent: Extent,
        cache: ChunkCache | None,
        basis: Basis | None = None,
    ) -> ReadSample[LogitsCodes]:
        shapes = self.layouts(spec, extent)
        offsets = ShardArray(directory / "sample_offsets", shapes.pop("sample_offsets"))
        entries = offsets.read(0, extent.samples + 1).tolist()
        ids = ShardArray(directory / "vocabulary", shapes.pop("vocabulary"))
        decoders = _id_decoders(ids, extent)
        arrays = {
            name: ShardArray(directory / name, layout, cache, decoders.get(name))
            for name, layout in shapes.items()
        }
        return _Opened(arrays, entries).read

    def decode(self, codes: LogitsCodes) -> LogitsFeatures:
        return codes.decode()

    def cut(
        self,
        codes: LogitsCodes,
        have: LogitsSpec,
        want: LogitsSpec,
        sample: Sample,
        identity: TeacherIdentity,
    ) -> LogitsCodes:
        """What is stored, but for `LogitsCodes.closed`; narrowed where a smaller distribution is wanted."""
        codes = codes.closed(identity.vocab_size)
        return codes if want == have else codes.narrow(want, sample.tokens)

    def measures(self, spec: LogitsSpec, stats: Stats, rows: int) -> dict[str, float | None]:
        # Of partial groups no entropy is known, and the known labels are the likely ones.
        labels = 0 if spec.partial else stats["labels"]
        return {
            "mean_head_size": stats["entries"] / rows,
            "mean_head_mass": stats["head_mass"] / rows,
            "mean_entropy": None if spec.partial else stats["entropy"] / rows,
            "perplexity": math.exp(min(-stats["label_logprob"] / labels, 700.0)) if labels else None,
        }

    def row_bytes(self, spec: LogitsSpec, hidden_size: int) -> float:
        return _ROW_BYTES + spec.top_k * _ENTRY_BYTES + spec.tail * _DRAW_BYTES

    def export_row_bytes(self, spec: LogitsSpec, hidden_size: int) -> int:
        return 8 * spec.top_k + 4 * spec.tail + 24

    def export_fields(self, spec: LogitsSpec) -> list[tuple[str, Any]]:
        heads = [("head_ids", pa.list_(IDS)), ("head_logprobs", pa.list_(NUMBERS))]
        rows = [("lse", NUMBERS), ("label_logprob", NUMBERS), ("entropy", NUMBERS)]
        return [*heads, *rows, *([("tail_ids", pa.list_(IDS))] if spec.tail else [])]

    def export_columns(
        self, spec: LogitsSpec, features: Sequence[LogitsFeatures], lengths: Sequence[int]
    ) -> dict[str, Any]:
        """Heads and draws as lists, numbers of a row flat."""
        counts, ids, logits, lse, label, entropy = (
            np.concatenate([getattr(f, name) for f in features])
            for name in ("counts", "ids", "logits", "lse", "label_logprob", "entropy")
        )
        logprobs = logits - np.repeat(lse, counts)
        columns = {
            "head_ids": lists(counts, pa.array(ids.astype(np.int32))),
            "head_logprobs": lists(counts, pa.array(logprobs)),
            "lse": pa.array(lse),
            "label_logprob": pa.array(label, from_pandas=True),
            "entropy": pa.array(entropy, from_pandas=True),
        }
        tails = [f.tail_ids for f in features if f.tail_ids is not None]
        if tails:
            draws = np.concatenate(tails)
            drawn = draws != NO_DRAW
            columns["tail_ids"] = lists(drawn.sum(axis=1), pa.array(draws[drawn]))
        return columns


@dataclass(frozen=True, eq=False)
class _Opened:
    """The arrays of an open group but for `sample_offsets`, which `entries` are, and `vocabulary`."""

    arrays: Mapping[str, ShardArray]
    entries: list[int]

    def read(self, position: int, start: int, stop: int) -> LogitsCodes:
        first, last = self.entries[position], self.entries[position + 1]
        names = ("head_count", "head_odds", "lse", "label_logprob", "entropy")
        counts, odds, lse, label_logprob, entropy = (self.arrays[n].read(start, stop) for n in names)
        if last - first != int(counts.sum(dtype=np.int64)) or not counts.all():
            path = self.arrays["head_count"].path
            raise CorruptionError(f"{path}: head sizes that do not add up to sample_offsets")
        draws = self.arrays["tail_index"].read(start, stop) if "tail_index" in self.arrays else None
        return LogitsCodes(
            counts=counts,
            ids=self.arrays["head_index"].read(first, last),
            gaps=self.arrays["head_gaps"].read(first, last),
            odds=odds,
            lse=lse,
            label_logprob=label_logprob,
            entropy=entropy,
            draws=None if draws is None else draws[:, 0],
            repeats=None if draws is None else draws[:, 1],
        )


def _id_decoders(vocabulary: ShardArray, extent: Extent) -> dict[str, Callable[[Array], Array]]:
    """What turns chunks of head_index into token ids, uint32, and rows of tail_index [R, M] into ids and how
    often each occurs, int32 [R, 2, M] (see LogitsCodes).
    """
    ids = vocabulary.read(0, extent.distinct_ids).astype(np.uint32)
    if int(ids.max()) >= extent.vocab_size:
        raise CorruptionError(f"{vocabulary.path}: ids outside the teacher's vocabulary")

    def draws(steps: Array) -> Array:
        # One running sum through all rows (modulo 2^32), less what each row began with: faster than one per
        # row.
        total = np.cumsum(steps.astype(np.int32), dtype=np.int32).reshape(steps.shape)
        places = (total - (total[:, :1] - steps[:, :1])).view(np.uint32)
        draw_ids = ids.take(places).view(np.int32)
        return np.stack([draw_ids, count_repeats(draw_ids)], axis=1)

    return {"head_index": ids.take, "tail_index": draws}


def narrowed(
    have: LogitsSpec, top_k: int | None = None, top_p: float | None = None, tail: int | None = None
) -> LogitsSpec | None:
    """The part of `have` that is asked for, None where it does not cover that.

    What is None is as in `have`; but draws exclude the head that they were made for, so that another head has
    none unless `tail` asks for them, which nothing covers then.
    """
    head = replace(have, top_k=top_k or have.top_k, top_p=top_p or have.top_p, tail=0, seed=0)
    if tail is None:
        tail = have.tail if (head.top_k, head.top_p) == (have.top_k, have.top_p) else 0
    if tail > have.tail:
        return None
    want = replace(head, tail=tail, seed=have.seed if tail else 0)
    return want if LogitsKind().covers(have, want) else None


def _unsigned(count: int) -> type[np.generic]:
    """The smaller of uint16 and uint32 that counts 0 .. count - 1."""
    return np.uint16 if count <= 2**16 else np.uint32


def _count_type(spec: LogitsSpec) -> type[np.generic]:
    """The smaller of uint8 and uint16 that holds the size of a head."""
    return np.uint8 if spec.top_k < 2**8 else np.uint16


def _check_rows(spec: LogitsSpec, one: LogitsFeatures, vocab_size: int) -> None:
    widest = min(spec.top_k, vocab_size)
    if int(one.counts.min()) < 1 or int(one.counts.max()) > widest:
        raise ValueError(f"head sizes must be in [1, {widest}]")
    if int(one.ids.max()) >= vocab_size:
        raise ValueError(f"head ids must be below the vocabulary size {vocab_size}")
    if not np.isfinite(one.lse).all():
        raise ValueError("lse must be finite")
    _check_known(spec, one)
    if (one.logits[row_starts(one.counts)[:-1]] > one.lse + 0.01).any():
        raise ValueError("a top logit exceeds the row's lse: these are not raw logits of one distribution")
    if (0 if one.tail_ids is None else one.tail_ids.shape[1]) != spec.tail:
        raise ValueError(f"{spec.tail} tail draws for each row are needed")
    if one.tail_ids is not None:
        _check_tail(one, one.tail_ids, vocab_size)


def _check_known(spec: LogitsSpec, one: LogitsFeatures) -> None:
    """NaN is allowed in the rows of partial groups alone, and for the label that the last row has not."""
    labels = one.label_logprob[:-1]
    if spec.partial:
        if not np.isnan(one.entropy).all():
            raise ValueError("the entropy of a partial group is unknown and must be NaN")
        labels = labels[~np.isnan(labels)]
    elif not np.isfinite(one.entropy).all():
        raise ValueError("entropy must be finite")
    if not np.isfinite(labels).all() or not np.isnan(one.label_logprob[-1]):
        raise ValueError("label_logprob must be finite, and NaN at the last position, which has no label")


def _check_tail(one: LogitsFeatures, draws: Array, vocab_size: int) -> None:
    ascending = (draws[:, 1:] >= draws[:, :-1]).all()
    if int(draws.min()) < NO_DRAW or int(draws.max()) >= vocab_size or not ascending:
        raise ValueError(f"tail ids must ascend in each row and be below the vocabulary size {vocab_size}")
    # NO_DRAW comes before every id.
    if ((draws[:, 0] == NO_DRAW) != (draws[:, -1] == NO_DRAW)).any():
        raise ValueError("a row has all of its tail draws or none")
    # Each rank of the heads against all draws, rows side by side: a look-up of the draws among the entries
    # would cost more than the rest of the encoding.
    heads_KT = np.full((int(one.counts.max()), len(one.counts)), NO_DRAW - 1, dtype=np.int32)
    heads_KT.T[np.arange(len(heads_KT)) < one.counts[:, None]] = one.ids
    draws_MT = np.ascontiguousarray(draws.T)
    if any((draws_MT == head_T).any() for head_T in heads_KT):
        raise ValueError("a tail draw is inside its row's head")


def _vocabulary(ids: Array, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(the distinct ids, frequent ones first [U], where each id stands in it [V], 0 for the others).

    Indexes into this list are small numbers mostly: their high bytes compress, those of ids do not. Ids whose
    frequencies are within a factor of sqrt(2) stay in ascending order, so that the list compresses too.
    """
    count = np.bincount(ids, minlength=vocab_size)
    used = np.flatnonzero(count)
    vocabulary = used[np.argsort(-np.floor(2 * np.log2(count[used])), kind="stable")]
    place = np.zeros(vocab_size, dtype=np.int64)
    place[vocabulary] = np.arange(len(vocabulary))
    return vocabulary, place
