"""Batches of a block: what goes into it, and what the teacher made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from student.blockwise.fitting import BlockBatch
from student.blockwise.plan import Block
from student.blockwise.states import Stream
from student.data.batches import CachedDataset, Collator
from student.data.decoding import Transform, decode_hidden
from student.data.teacher_weights import load_bases

Parts = Mapping[str, Tensor]


class BlockReader:
    """Reads batches of the samples that a student's blocks are trained and measured on.

    Args:
        reader: the cache.
        indices: of the samples in it; from here on they are numbered from 0.
        block: whose batches.
        specs: what is stored at each boundary.
        stream: the student's states at the boundary that goes into the block; None for the teacher's.

    Example:
        read = BlockReader(reader, indices, block, specs, stream)
        batch = read([0, 1, 2, 3])
    """

    def __init__(
        self,
        reader: CacheReader,
        indices: Sequence[int],
        block: Block,
        specs: Mapping[int, HiddenSpec],
        stream: Stream | None,
    ) -> None:
        self._block, self._stream = block, stream
        self._bases: dict[str, Transform] = load_bases(reader)
        boundaries = {block.target, block.given} if stream is None and block.given else {block.target}
        groups = [specs[boundary] for boundary in sorted(boundaries)]
        self._samples, self._lay_out = CachedDataset(reader, indices, groups), Collator(groups, pad_token=0)
        self._texts, self._lay_out_text = CachedDataset(reader, indices, ()), Collator((), pad_token=0)

    def given(self, sample: int) -> Tensor:
        """What goes into the student's own block for one sample; what the teacher made of it is not read."""
        if self._stream is not None:
            return self._stream.batch([sample])
        tokens: Tensor = self._lay_out_text([self._texts[sample]])["input_ids"]
        return tokens

    def __call__(self, samples: Sequence[int]) -> BlockBatch:
        batch = self._lay_out([self._samples[sample] for sample in samples])
        coded: Mapping[int, Parts] = batch["coded_hidden"]
        target = coded[self._block.target]
        return BlockBatch(
            given=self._given(samples, batch["input_ids"], coded),
            target_BTD=decode_hidden(target, self._bases).float(),
            weight_BT=target.get("weight", batch["attention_mask"].float()),
        )

    def _given(self, samples: Sequence[int], input_ids_BT: Tensor, coded: Mapping[int, Parts]) -> Tensor:
        if not self._block.number:
            return input_ids_BT
        if self._stream is not None:
            return self._stream.batch(samples)
        return decode_hidden(coded[self._block.given], self._bases).float()
