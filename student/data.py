"""From the cache to batches: a map-style dataset over `featurestore.CacheReader`, and the collator.

Shape letters: B batch, T positions (padded to the longest sample of the batch), K head columns (padded), D
hidden size, nnz head entries of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featurestore.order import epoch_order
from featurestore.reader import CachedSample, CacheReader
from featurestore.schema import NO_DRAW, GroupSpec, HiddenFeatures, HiddenSpec, LogitsFeatures, LogitsSpec
from student.losses.sparse import complete_targets

IGNORE = -100  # label of a position that is not learned, the value that Trainer leaves out of its count


class CachedDataset(torch.utils.data.Dataset[CachedSample]):
    """Samples `indices` of the cache with the features of `groups`; opened lazily in each loader process."""

    def __init__(self, reader: CacheReader, indices: Sequence[int], groups: Sequence[GroupSpec]) -> None:
        self._reader, self._indices, self.groups = reader, list(indices), tuple(groups)

    @property
    def manifest_digest(self) -> str:
        """Digest of the manifest that the samples are read from."""
        return self._reader.manifest_digest

    def shards(self) -> list[list[int]]:
        """Positions in this data set by the shard that holds them."""
        place = {index: position for position, index in enumerate(self._indices)}
        kept = ([place[i] for i in shard if i in place] for shard in self._reader.shards())
        return [shard for shard in kept if shard]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> CachedSample:
        return self._reader.read(self._indices[index], self.groups)


class CacheOrder(torch.utils.data.Sampler[int]):
    """Positions in a CachedDataset in the order of `featurestore.order`, another one in each epoch.

    The order depends on manifest, seed and epoch alone, so a resumed run reads what is left, with any number
    of processes that keeps the global batch. `set_epoch` is called by Trainer.
    """

    def __init__(self, dataset: CachedDataset, seed: int) -> None:
        self._digest, self._shards = dataset.manifest_digest, dataset.shards()
        self._length, self._seed, self.epoch = len(dataset), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self._digest, self._seed, self.epoch, self._shards).tolist()


def learned_labels(tokens_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """The label of every position, int64 [T]: the next token where it exists and is learned, else IGNORE."""
    labels_T = np.full(len(tokens_T), IGNORE, np.int64)
    labels_T[:-1] = np.where(mask_T[1:], tokens_T[1:], IGNORE)
    return labels_T


class Collator:
    """Pads samples on the right to the longest one and lays out what the model and the objective read.

    The batch: input_ids int64 [B, T]; attention_mask int64 [B, T]; labels int64 [B, T], the label OF position
    t (already shifted), IGNORE where nothing is learned; with a `logits` group head_ids int64 [B, T, K],
    head_logprobs float32 [B, T, K] (-inf on padding), tail_logprob float32 [B, T] and label_logprob float32
    [B, T] (the teacher's; NaN where unknown), and with a sampled tail teacher_entropy float32 [B, T]; with
    hidden groups hidden_targets {teacher layer: float32 or bfloat16 [B, T, D]}.
    """

    def __init__(self, groups: Sequence[GroupSpec], vocab_size: int, pad_token: int) -> None:
        self._logits = next((group for group in groups if isinstance(group, LogitsSpec)), None)
        self._hidden = [group for group in groups if isinstance(group, HiddenSpec)]
        self._vocab_size, self._pad_token = vocab_size, pad_token

    def __call__(self, samples: Sequence[CachedSample]) -> dict[str, Any]:
        lengths = [len(sample.tokens) for sample in samples]
        shape = (len(samples), max(lengths))
        input_ids = np.full(shape, self._pad_token, np.int64)
        attention = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            input_ids[row, :length] = sample.tokens
            attention[row, :length] = 1
            labels[row, :length] = learned_labels(sample.tokens, sample.loss_mask)
        arrays = {"input_ids": input_ids, "attention_mask": attention, "labels": labels}
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._logits is not None:
            features = [_logits_features(sample.features, self._logits) for sample in samples]
            batch.update(pad_heads(features, shape[1], self._vocab_size))
        if self._hidden:
            batch["hidden_targets"] = {
                group.layer: pad_hidden([_hidden_features(s.features, group) for s in samples], shape[1])
                for group in self._hidden
            }
        return batch


def pad_heads(features: Sequence[LogitsFeatures], length: int, vocab_size: int) -> dict[str, Tensor]:
    """The sparse targets of a batch: ragged heads padded to [B, length, K], with the mass outside each head.

    Padding columns repeat the row's first id with log-probability -inf. Where the features hold tail draws,
    these are further columns that share the mass outside the head, and teacher_entropy float32 [B, length] is
    set (see SparseTargets).
    """
    counts_BT = np.zeros((len(features), length), np.int64)
    lse_BT = np.zeros((len(features), length), np.float32)
    label_BT = np.zeros((len(features), length), np.float32)
    for row, feature in enumerate(features):
        counts_BT[row, : len(feature.counts)] = feature.counts
        lse_BT[row, : len(feature.lse)] = feature.lse
        label_BT[row, : len(feature.lse)] = feature.label_logprob
    width = int(counts_BT.max())
    real_BTK = np.arange(width) < counts_BT[..., None]
    ids_BTK = np.zeros(real_BTK.shape, np.int64)
    ids_BTK[real_BTK] = np.concatenate([feature.ids for feature in features])
    ids_BTK = np.where(real_BTK, ids_BTK, ids_BTK[..., :1])
    logprob_BTK = np.full(real_BTK.shape, -np.inf)
    logprob_BTK[real_BTK] = np.concatenate([feature.logits for feature in features])
    logprob_BTK -= lse_BT[..., None]
    full_BT = torch.from_numpy(counts_BT == vocab_size)
    head_logprobs, tail_logprob = complete_targets(torch.from_numpy(logprob_BTK), full_BT)
    batch = {
        "head_ids": torch.from_numpy(ids_BTK),
        "head_logprobs": head_logprobs.float(),
        "tail_logprob": tail_logprob.float(),
        "label_logprob": torch.from_numpy(label_BT),
    }
    return batch if features[0].tail_ids is None else add_draws(batch, features)


def add_draws(batch: dict[str, Tensor], features: Sequence[LogitsFeatures]) -> dict[str, Tensor]:
    """The same targets with the tail's draws as columns: each distinct id once, weighted by its repeats."""
    tails = [feature.tail_ids for feature in features if feature.tail_ids is not None]
    count = tails[0].shape[1]
    draws_BTM = np.full((*batch["tail_logprob"].shape, count), NO_DRAW, np.int64)
    entropy_BT = np.full(draws_BTM.shape[:2], np.nan, np.float32)
    for row, (tail_TM, feature) in enumerate(zip(tails, features, strict=True)):
        draws_BTM[row, : len(tail_TM)] = tail_TM
        entropy_BT[row, : len(tail_TM)] = np.where(tail_TM[:, 0] == NO_DRAW, np.nan, feature.entropy)
    first_BTM = np.diff(draws_BTM, axis=-1, prepend=NO_DRAW) != 0
    # Where the next distinct draw begins: a running minimum from the right.
    begins_BTM = np.where(first_BTM, np.arange(count), count)
    following = np.minimum.accumulate(begins_BTM[..., ::-1], axis=-1)[..., ::-1]
    following = np.concatenate([following[..., 1:], np.full_like(following[..., :1], count)], axis=-1)
    repeats_BTM = np.where(first_BTM, following - np.arange(count), 0)
    with np.errstate(divide="ignore"):
        share_BTM = torch.from_numpy(np.log(repeats_BTM / count).astype(np.float32))
    logprob_BTM = batch["tail_logprob"].unsqueeze(-1) + share_BTM
    real_BTM = torch.isfinite(logprob_BTM)
    ids_BTM = torch.where(real_BTM, torch.from_numpy(draws_BTM), batch["head_ids"][..., :1])
    entropy = torch.from_numpy(entropy_BT)
    return batch | {
        "head_ids": torch.cat([batch["head_ids"], ids_BTM], dim=-1),
        "head_logprobs": torch.cat([batch["head_logprobs"], logprob_BTM], dim=-1),
        "tail_logprob": batch["tail_logprob"].masked_fill(~torch.isnan(entropy), -math.inf),
        "teacher_entropy": entropy,
    }


def pad_hidden(features: Sequence[HiddenFeatures], length: int) -> Tensor:
    """Hidden states of a batch, [B, length, D]: bfloat16 when stored so, else float32; zero on padding."""
    tensors = [_hidden_tensor(feature) for feature in features]
    padded = tensors[0].new_zeros(len(tensors), length, tensors[0].shape[1])
    for row, tensor in enumerate(tensors):
        padded[row, : len(tensor)] = tensor
    return padded


def _hidden_tensor(feature: HiddenFeatures) -> Tensor:
    if feature.dtype == "bf16":
        return torch.from_numpy(np.ascontiguousarray(feature.values)).view(torch.bfloat16)
    return torch.from_numpy(feature.to_float32())


def _logits_features(features: Mapping[GroupSpec, Any], group: LogitsSpec) -> LogitsFeatures:
    feature = features[group]
    assert isinstance(feature, LogitsFeatures)
    return feature


def _hidden_features(features: Mapping[GroupSpec, Any], group: HiddenSpec) -> HiddenFeatures:
    feature = features[group]
    assert isinstance(feature, HiddenFeatures)
    return feature
