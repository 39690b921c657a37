"""What the page about a store says, gathered: its records, and a look at some of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featurestore.errors import CorruptionError, MissingFeatureError
from featurestore.maintenance.info import StoreInfo, store_info
from featurestore.maintenance.inspect import SampleView, Survey, look_at, survey
from featurestore.maintenance.listing import Shard, list_shards
from featurestore.reader import CacheReader
from pipeline.report.token_text import Pieces, load_pieces

# The sample that is shown: the first with so many tokens, else the longest; and what of it.
_LONG_ENOUGH = 64
_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """survey, view: None where there are no logits or no manifest, or `damage` says why they are not read.

    pieces: text of a token id, None where there is no tokenizer. lengths: of all samples of the manifest.
    """

    info: StoreInfo
    shards: list[Shard]
    lengths: list[int]
    survey: Survey | None = None
    view: SampleView | None = None
    pieces: Pieces | None = None
    damage: str = ""


def gather(store: str, samples: int) -> StoreFacts:
    """Sum up the records of `store` and read up to `samples` of its samples, spread over it.

    Raises what opening a store raises; damaged features are named in `damage`.
    """
    info, shards = store_info(store), list_shards(store)
    if info.manifest is None or not info.samples:
        return StoreFacts(info=info, shards=shards, lengths=[])
    reader = CacheReader.open(store)
    lengths = reader.lengths.tolist()
    try:
        found = survey(reader, samples)
        view = look_at(reader, _to_show(reader), _TOKENS)
    except MissingFeatureError:
        return StoreFacts(info=info, shards=shards, lengths=lengths)
    except CorruptionError as error:
        return StoreFacts(info=info, shards=shards, lengths=lengths, damage=str(error))
    return StoreFacts(
        info=info,
        shards=shards,
        lengths=lengths,
        survey=found,
        view=view,
        pieces=load_pieces(reader.teacher_dir),
    )


def _to_show(reader: CacheReader) -> int:
    lengths = np.asarray(reader.lengths)
    enough = np.flatnonzero(lengths >= _LONG_ENOUGH)
    return int(enough[0] if len(enough) else lengths.argmax())
