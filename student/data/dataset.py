"""A cache as a torch data set of plain tensors, for a training loop of one's own.

Shape letters: B batch, T positions, C columns of a sparse distribution, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from featurestore.format.schema import GroupSpec
from featurestore.order import EpochOrder
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, Collator
from student.data.decoding import decode_hidden, decode_labels, decode_targets
from student.data.teacher_weights import load_bases

_FILL = {"labels": IGNORE, "teacher_logprobs": -math.inf, "teacher_rest": -math.inf}


class DistillationDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A cache as a map-style torch data set: each item is one sample with its features, decoded.

    An item has

    - input_ids int64 [T];
    - labels int64 [T]: the token that follows, -100 where nothing is learned;
    - with a distribution in the cache, teacher_ids int64 [T, C] and teacher_logprobs float32 [T, C], -inf in
      unused columns: the tokens that are stored with their log-probabilities, and where the cache holds
      draws from outside them, each distinct draw with its share of the remaining mass. Then the exponentials
      of a row sum to one, and sum(exp(teacher_logprobs) * f(teacher_ids)) is an unbiased estimate of the
      teacher's mean of f. teacher_rest float32 [T]: the logarithm of the mass that no column stands for;
      teacher_label_logprob float32 [T]: the teacher's log-probability of the next token, whether it is in the
      columns or not, NaN where the cache does not know it;
    - teacher_hidden_L float32 or bfloat16 [T, D] for each cached layer L;
    - with a layer L that is cached at a share of the positions, teacher_hidden_L_weight float32 [T]: the
      inverse of the share where the state is stored, and 0 where it is not (the state there is that of
      another position). A loss of each position times this weight is on average the loss itself.

    Args:
        cache: an open cache, or where it is.
        groups: which features are read; None: all that every sample has.
        samples: indices of samples; None: all.

    Raises:
        StoreNotFoundError: there is no cache.
        MissingFeatureError: a spec is not in the cache.

    Example:
        data = DistillationDataset("run/cache")
        loader = DataLoader(data, batch_size=8, sampler=data.order(epoch=0), collate_fn=data.collate)
    """

    def __init__(
        self,
        cache: CacheReader | str | Path,
        groups: Sequence[GroupSpec] | None = None,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.reader = cache if isinstance(cache, CacheReader) else CacheReader.open(cache)
        for spec in groups or ():
            self.reader.find(spec.kind)
        indices = range(len(self.reader)) if samples is None else samples
        self._coded = CachedDataset(self.reader, indices, groups or self.reader.complete_groups())
        self._bases = load_bases(self.reader)
        self._lay_out = Collator(self._coded.groups, pad_token=0)

    def __len__(self) -> int:
        return len(self._coded)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self._lay_out([self._coded[index]])
        labels_T = batch["labels"][0]
        item = {"input_ids": batch["input_ids"][0], "labels": labels_T}
        if coded_head := batch.get("coded_head"):
            coded = {name: part[0] for name, part in coded_head.items()}
            targets = decode_targets(coded, labels_T)
            item["teacher_ids"], item["teacher_logprobs"] = targets.ids_NK, targets.logprob_NK
            item["teacher_rest"] = targets.tail_N
            item["teacher_label_logprob"] = decode_labels(coded["label_logprob"])
        for layer, coded_layer in batch.get("coded_hidden", {}).items():
            states = decode_hidden({name: part[0] for name, part in coded_layer.items()}, self._bases)
            item[f"teacher_hidden_{layer}"] = states
            if "weight" in coded_layer:
                item[f"teacher_hidden_{layer}_weight"] = coded_layer["weight"][0]
        return item

    def order(self, epoch: int, seed: int = 0) -> EpochOrder:
        """The indices in a random order that reads one shard after the other, the same on every machine.

        Args:
            epoch: each has an order of its own.
            seed: of all of them.

        Returns:
            Indices into this data set, for the argument `sampler` of a `DataLoader`: a sequence that is
            computed as it is read, from any step on by its `starting(step)`.
        """
        return self._coded.epoch_order(seed, epoch)

    @staticmethod
    def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of items, for the argument `collate_fn` of a `DataLoader`.

        Args:
            items: samples of this data set.

        Returns:
            The tensors of the items, padded on the right to [B, T, ...], and attention_mask int64 [B, T].
        """
        longest = max(len(item["input_ids"]) for item in items)
        batch = {name: _stack(name, [item[name] for item in items], longest) for name in items[0]}
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


def _stack(name: str, rows: Sequence[Tensor], longest: int) -> Tensor:
    """[t, ...] of each sample -> [B, T, ...]; a second dimension of several widths gets the widest."""
    fill = _FILL.get(name, 0)
    widths = [row.shape[1] for row in rows] if rows[0].dim() > 1 else []
    padded = []
    for row in rows:
        wider = (0, max(widths) - row.shape[1]) if widths else ()
        padded.append(pad(row, (*wider, 0, longest - len(row)), value=fill))
    return torch.stack(padded)
