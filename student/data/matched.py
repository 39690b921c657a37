"""Samples that several caches hold, and batches with the features of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from featurestore.format.schema import GroupSpec
from featurestore.reader import CodedSample
from student.data.batches import Array, CachedDataset, Collator, codes_of
from student.data.measures import Curriculum, WeighedSample
from student.data.retokenised import RetokenisedCollator, RetokenisedDataset
from student.data.stores import CacheStores, order_digest


@dataclass(frozen=True, eq=False, kw_only=True)
class MatchedSample(WeighedSample):
    """A sample as the first cache has it. further: the same sample with the features of each other cache."""

    further: tuple[CodedSample, ...]


class MatchedDataset(CachedDataset):
    """Samples `indices` of the first cache, which all hold, with the features of `groups`, for each cache."""

    def __init__(
        self,
        stores: CacheStores,
        indices: Sequence[int],
        groups: Sequence[Sequence[GroupSpec]],
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__(stores.first, indices, groups[0], curriculum)
        self._stores = stores
        self.further_groups = tuple(map(tuple, groups[1:]))
        self._further = [self._reading(store, one) for store, one in enumerate(self.further_groups, 1)]

    def record(self) -> dict[str, Any]:
        """What is read, for checkpoints."""
        return super().record() | {"further_manifests": list(self._stores.manifests[1:])}

    @property
    def order_digest(self) -> str:
        """What the order of samples follows from: all manifests."""
        return order_digest(self._stores.manifests)

    def shard(self, index: int) -> int:
        """A number for the shards that hold a sample, one of each cache."""
        number = 0
        for store, reader in enumerate(self._stores.readers):
            number = number * reader.shards + reader.shard(self._place(store, index))
        return number

    def warm(self, index: int) -> None:
        """Have the shards of a sample at hand and verified."""
        for store, groups in enumerate((self._read, *(read for _, read in self._further))):
            self._stores.readers[store].warm(self._place(store, index), groups)

    def __getitem__(self, index: int) -> MatchedSample:
        """Sample `index`; for ~index the same one with nothing to learn."""
        sample = super().__getitem__(index)
        assert isinstance(sample, MatchedSample)
        return sample

    def _sample(self, index: int) -> MatchedSample:
        first = self._reader.read_codes(self._indices[index], self._read)
        further = [
            self._stores.readers[store].read_codes(self._place(store, index), groups)
            for store, (_, groups) in enumerate(self._further, 1)
        ]
        known = {field.name: getattr(first, field.name) for field in fields(first)}
        sample = MatchedSample(**known, further=tuple(further))
        if self.curriculum is None:
            return sample
        others = [codes_of(one, spec) for one, (spec, _) in zip(further, self._further, strict=True)]
        taught = self._taught(sample, [codes_of(sample, self._measured), *others])
        assert isinstance(taught, MatchedSample)
        return taught

    def _masked(self, sample: CodedSample, learned: Array) -> CodedSample:
        """The same positions of a sample are learned from each cache."""
        assert isinstance(sample, MatchedSample)
        further = tuple(replace(one, loss_mask=learned) for one in sample.further)
        return replace(sample, loss_mask=learned, further=further)

    def _place(self, store: int, index: int) -> int:
        return self._stores.index(store, self._indices[index])


_CODED = ("coded_head", "coded_hidden")


class MatchedCollator(Collator):
    """Lays out the first cache's part of samples as Collator does, and in `further` {number of a cache, from
    1 on: its coded_head and coded_hidden}, in the same rows.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[GroupSpec]],
        pad_token: int,
        pack: bool = False,
        drop_idle: bool = False,
    ) -> None:
        super().__init__(groups[0], pad_token, pack, drop_idle)
        self._others = [Collator(one, pad_token, pack, drop_idle) for one in groups[1:]]

    def __call__(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        further = {}
        for place, collate in enumerate(self._others):
            parts = [sample.further[place] for sample in samples if isinstance(sample, MatchedSample)]
            batch = collate(parts)
            further[place + 1] = {name: batch[name] for name in _CODED if name in batch}
        return super().__call__(samples) | {"further": further}


def collator_of(
    dataset: CachedDataset, pad_token: int, pack: bool = False, drop_idle: bool = False
) -> Collator:
    """What lays out the samples of a data set."""
    if isinstance(dataset, RetokenisedDataset):
        assert not pack
        return RetokenisedCollator(dataset.groups, dataset.other, pad_token, drop_idle)
    if isinstance(dataset, MatchedDataset):
        groups = (dataset.groups, *dataset.further_groups)
        return MatchedCollator(groups, pad_token, pack, drop_idle)
    return Collator(dataset.groups, pad_token, pack, drop_idle)
