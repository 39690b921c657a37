"""From the cache to batches: a map-style dataset over `featurestore.CacheReader`, and the collator.

Shape letters: B batch, T positions (padded to the longest sample of the batch), K head columns (padded), M
tail draws, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurestore.format.codec import CLOSED
from featurestore.format.codes import LogitsCodes
from featurestore.format.schema import GroupSpec, HiddenFeatures, HiddenSpec, LogitsSpec, LseFeatures, LseSpec
from featurestore.order import EpochOrder
from featurestore.prefetch import prefetched
from featurestore.reader import CacheReader, CodedSample
from student.data.measures import Curriculum, WeighedSample
from student.data.packing import pack, position_ids

Array = npt.NDArray[Any]

IGNORE = -100  # label of a position that is not learned, the value that Trainer leaves out of its count
CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 8, 256  # at most


class CachedDataset(torch.utils.data.Dataset[CodedSample]):
    """Samples `indices` of the cache with the features of `groups`; opened lazily in each loader process.

    curriculum: which of their positions are learned; what its measures are read from is read beside `groups`.
    """

    def __init__(
        self,
        reader: CacheReader,
        indices: Sequence[int],
        groups: Sequence[GroupSpec],
        curriculum: Curriculum | None = None,
    ) -> None:
        self._reader, self._indices, self.groups = reader, indices, tuple(groups)
        self.curriculum = curriculum
        self._measured, self._read = self._reading(0, self.groups)

    @property
    def manifest_digest(self) -> str:
        """Digest of the manifest that the samples are read from."""
        return self._reader.manifest_digest

    @property
    def order_digest(self) -> str:
        """What the order of samples follows from, 32 hex digits."""
        return self.manifest_digest

    def record(self) -> dict[str, Any]:
        """What is read, for checkpoints."""
        asked = {} if self.curriculum is None else self.curriculum.record()
        return {"manifest": self.manifest_digest, **asked}

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        """The positions in this data set in the order of one epoch."""
        block = -(-len(self._reader) // self._reader.shards)
        return EpochOrder(self.order_digest, seed, epoch, len(self), block)

    def shard(self, index: int) -> int:
        """The number of the shard that holds a sample."""
        return self._reader.shard(self._indices[index])

    def warm(self, index: int) -> None:
        """Have the shard of a sample at hand and verified; see CacheReader.warm."""
        self._reader.warm(self._indices[index], self._read)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> CodedSample:
        """Sample `index`; for ~index the same one with nothing to learn."""
        sample = self._sample(max(index, ~index))
        return sample if index >= 0 else self._masked(sample, np.zeros_like(sample.loss_mask))

    def _sample(self, index: int) -> CodedSample:
        sample = self._reader.read_codes(self._indices[index], self._read)
        return sample if self.curriculum is None else self._taught(sample, [codes_of(sample, self._measured)])

    def _taught(self, sample: CodedSample, codes: Sequence[LogitsCodes | None]) -> CodedSample:
        """A sample as the curriculum has it learned; codes: what measures are read from, of each cache."""
        assert self.curriculum is not None
        learned, weight = self.curriculum.apply(sample, codes)
        if not isinstance(sample, WeighedSample):
            sample = WeighedSample(
                **{field.name: getattr(sample, field.name) for field in fields(CodedSample)}
            )
        return self._masked(replace(sample, weight=weight), learned)

    def _masked(self, sample: CodedSample, learned: Array) -> CodedSample:
        return replace(sample, loss_mask=learned)

    def _reading(
        self, store: int, groups: tuple[GroupSpec, ...]
    ) -> tuple[LogitsSpec | None, tuple[GroupSpec, ...]]:
        """(the distribution of a cache that measures are read from, all that is read of it). Any part of a
        cache's distribution knows the same of a position, so that of `groups` does where there is one.
        """
        spec = None if self.curriculum is None else self.curriculum.specs[store]
        if spec is None:
            return None, groups
        there = next((group for group in groups if isinstance(group, LogitsSpec)), None)
        return (spec, (*groups, spec)) if there is None else (there, groups)


def calibration_samples(dataset: CachedDataset) -> list[Tensor]:
    """The beginnings of the first samples, int64 [t] each: always the same, and none that is held out."""
    count = min(CALIBRATION_SAMPLES, len(dataset))
    tokens = [dataset[index].tokens[:CALIBRATION_LENGTH] for index in range(count)]
    return [torch.from_numpy(ids.astype(np.int64)) for ids in tokens]


class CacheOrder(torch.utils.data.Sampler[int]):
    """Positions in a CachedDataset in the order of `featurestore.order`, another one in each epoch.

    The order depends on manifest, seed and epoch alone, so a resumed run reads what is left, with any number
    of processes that keeps the global batch. Shards that come next are fetched and verified by a thread
    meanwhile.

    global_batch: samples of one optimizer step, of all processes. An epoch is whole steps: what its last step
    lacks is filled up with repeats that teach nothing (accelerate would fill it with samples that count
    twice, and only where there are several processes), or with drop_last the step is left out. epoch: asked
    at the start of each iteration. accelerate's set_epoch does not reach the sampler of several processes in
    the epoch in which a run is resumed, so there is none.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        seed: int,
        global_batch: int,
        epoch: Callable[[], int],
        drop_last: bool = False,
    ) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch
        steps = len(dataset) // global_batch if drop_last else -(-len(dataset) // global_batch)
        self._length = steps * global_batch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = self._dataset.epoch_order(self._seed, self._epoch())
        reading = prefetched(order, self._dataset.shard, self._dataset.warm)
        yield from islice(reading, self._length)
        yield from [~last for last in order[-1:]] * (self._length - len(order))


class Collator:
    """Pads samples on the right to the longest one and lays out what the model and the objective read.

    The batch: input_ids int64 [B, T]; attention_mask int64 [B, T]; labels int64 [B, T], the label OF position
    t (already shifted), IGNORE where nothing is learned; with a `logits` group coded_head, see `pad_logits`;
    with hidden groups coded_hidden {teacher layer: see `pad_hidden`}, and for a share of the positions with
    weight float32 [B, T], the inverse of the share where there is a state and 0 elsewhere; of samples with
    weights weight float32 [B, T], 0 where nothing is learned. Features stay
    coded as in the store: `student.data.decoding` decodes them on the model's device. With `pack` a row holds
    several samples and position_ids int64 [B, T] begin anew with each of them, see `student.data.packing`.
    With `drop_idle` samples of which nothing is learned are left out, but for one where there is no other.
    """

    def __init__(
        self, groups: Sequence[GroupSpec], pad_token: int, pack: bool = False, drop_idle: bool = False
    ) -> None:
        self._logits = next((group for group in groups if isinstance(group, LogitsSpec)), None)
        self._lse = [group for group in groups if isinstance(group, LseSpec)]
        self._hidden = [group for group in groups if isinstance(group, HiddenSpec)]
        self._pad_token = pad_token
        self._pack, self._drop_idle = pack, drop_idle

    def __call__(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        if self._drop_idle:
            samples = [sample for sample in samples if sample.loss_mask.any()] or samples[:1]
        if not self._pack:
            return self._padded(samples)
        rows, lengths = pack(samples)
        batch = self._padded(rows)
        return batch | {"position_ids": position_ids(lengths, batch["input_ids"].shape[1])}

    def _padded(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        lengths = np.array([len(sample.tokens) for sample in samples])
        length = int(lengths.max())
        input_ids = pad([sample.tokens for sample in samples], length, np.int64, self._pad_token)
        learned = pad([sample.loss_mask for sample in samples], length, np.bool_)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": torch.from_numpy((np.arange(length) < lengths[:, None]).astype(np.int64)),
            "labels": next_labels(input_ids, learned),
        }
        weights = [sample.weight for sample in samples if isinstance(sample, WeighedSample)]
        known = [weight for weight in weights if weight is not None]
        if known:
            idle_BT = batch["labels"] == IGNORE
            batch["weight"] = pad(known, length, np.float32).masked_fill_(idle_BT, 0.0)
        if self._logits is not None:
            codes = [_logits_codes(sample, self._logits) for sample in samples]
            batch["coded_head"] = pad_logits(codes, length)
            if self._lse:
                batch["coded_head"]["lse"] = pad([row.lse for row in codes], length, np.int32)
            for group in self._lse:
                rows = [_lse(sample, group) for sample in samples]
                batch["coded_head"][group.kind] = pad(rows, length, np.float32)
        if self._hidden:
            batch["coded_hidden"] = {
                group.layer: _coded_hidden(group, samples, length) for group in self._hidden
            }
        return batch


def next_labels(input_ids_BT: Tensor, learned_BT: Tensor) -> Tensor:
    """The label of every position, int64 [B, T]: the next token where there is one that is learned, else
    IGNORE.
    """
    labels_BT = torch.full_like(input_ids_BT, IGNORE)
    labels_BT[:, :-1] = torch.where(learned_BT[:, 1:], input_ids_BT[:, 1:], IGNORE)
    return labels_BT


def pad(rows: Sequence[Array], length: int, dtype: npt.DTypeLike, fill: int = 0) -> Tensor:
    """Arrays [t, ...] of B samples as one tensor [B, length, ...]."""
    out = np.empty((len(rows), length, *rows[0].shape[1:]), dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)], row[len(values) :] = values, fill
    return torch.from_numpy(out)


def pad_logits(codes: Sequence[LogitsCodes], length: int) -> dict[str, Tensor]:
    """The coded distributions of a batch, ragged heads padded to the widest, K.

    counts, odds: int16 [B, T]; ids: int32 [B, T, K], padding repeats a row's first one; gaps: int16 [B, T,
    K]; label_logprob: int32 [B, T]; where draws are kept also draws, repeats: int32 [B, T, M] and entropy:
    int16 [B, T]. torch has few operations for unsigned integers, so that these travel as the bits of their
    signed twins.
    """
    counts_BT = pad([row.counts for row in codes], length, np.uint16).numpy()
    # Where each entry of the padded heads lies in the ragged ones: padding takes a row's first.
    starts_BT = np.zeros(counts_BT.shape, np.int64)
    np.cumsum(counts_BT.ravel()[:-1], out=starts_BT.ravel()[1:])
    rank_K = np.arange(int(counts_BT.max()), dtype=np.uint16)
    place_BTK = starts_BT[..., None] + rank_K * (rank_K < counts_BT[..., None])
    place_BTK[counts_BT == 0] = 0

    def heads(values: list[Array]) -> Tensor:
        return torch.from_numpy(np.concatenate(values).take(place_BTK))

    batch = {
        "counts": torch.from_numpy(counts_BT.view(np.int16)),
        "odds": pad([row.odds for row in codes], length, np.int16, CLOSED),
        "ids": heads([row.ids.view(np.int32) for row in codes]),
        "gaps": heads([row.gaps.view(np.int16) for row in codes]),
        "label_logprob": pad([row.label_logprob.view(np.int32) for row in codes], length, np.int32, -1),
    }
    draws = [row.draws for row in codes if row.draws is not None]
    if draws:
        batch["draws"] = pad(draws, length, np.int32)
        batch["repeats"] = pad([row.repeats for row in codes if row.repeats is not None], length, np.int32)
        batch["entropy"] = pad([row.entropy.view(np.int16) for row in codes], length, np.int16)
    return batch


def pad_hidden(features: Sequence[HiddenFeatures], length: int) -> dict[str, Tensor]:
    """Hidden states of a batch as stored: values [B, T, D] in bfloat16, float32, int8 or uint8 (the bits of
    fp8), and for the last two scale float32 [B, T]. Rows of int4 and int2 are named by their type and
    D: int4.576, uint8 [B, T, W]; those of klt4 and klt6 by the digest of their basis.
    """
    # torch has no arithmetic for uint16, which holds the bits of bfloat16.
    bf16 = features[0].dtype == "bf16"
    rows = [f.values.view(np.int16) if bf16 else f.values for f in features]
    values = pad(rows, length, rows[0].dtype)
    dtype, basis = features[0].dtype, features[0].basis
    size = basis.digest if basis else features[0].hidden_size
    coded = {f"{dtype}.{size}" if size else "values": values.view(torch.bfloat16) if bf16 else values}
    scales = [f.scale for f in features if f.scale is not None]
    return coded | {"scale": pad(scales, length, np.float32)} if scales else coded


def _coded_hidden(group: HiddenSpec, samples: Sequence[CodedSample], length: int) -> dict[str, Tensor]:
    codes = [_hidden_codes(sample, group) for sample in samples]
    if group.whole:
        return pad_hidden(codes, length)
    lengths = [len(sample.tokens) for sample in samples]
    coded = pad_hidden([_filled(one, size) for one, size in zip(codes, lengths, strict=True)], length)
    weights = [np.zeros(size, np.float32) for size in lengths]
    for weight, one in zip(weights, codes, strict=True):
        weight[one.positions] = 1 / group.share
    return coded | {"weight": pad(weights, length, np.float32)}


def _filled(share: HiddenFeatures, length: int) -> HiddenFeatures:
    """States at all positions: where there is none, the one before, of which any loss makes a number."""
    positions = share.positions
    assert positions is not None
    if not len(positions):
        share = replace(share, values=np.zeros((1, *share.values.shape[1:]), share.values.dtype))
        share = share if share.scale is None else replace(share, scale=np.zeros(1, np.float32))
    rows = np.searchsorted(positions, np.arange(length), side="right") - 1
    return replace(share, positions=None).at(np.maximum(rows, 0))


def codes_of(sample: CodedSample, spec: LogitsSpec | None) -> LogitsCodes | None:
    """The coded distribution of a sample; None where none is asked for."""
    return None if spec is None else _logits_codes(sample, spec)


def _logits_codes(sample: CodedSample, group: LogitsSpec) -> LogitsCodes:
    codes = sample.features[group]
    assert isinstance(codes, LogitsCodes)
    return codes


def _lse(sample: CodedSample, group: LseSpec) -> Array:
    features = sample.features[group]
    assert isinstance(features, LseFeatures)
    return features.lse


def _hidden_codes(sample: CodedSample, group: HiddenSpec) -> HiddenFeatures:
    codes = sample.features[group]
    assert isinstance(codes, HiddenFeatures)
    return codes
