"""In which order a training run reads a cache: a pure function of (manifest digest, seed, epoch).

The shards of the manifest are permuted, cut into windows of W shards, and the samples of each window are
permuted. So neighbours in the order come from at most W shards, which a reader keeps open, while the shuffle
is close to a full one (with 64 shards per window, 15.88 of the 15.94 bits of a full shuffle's entropy).

Nothing here knows how many processes read: ranks and workers take their share of one global order, so that a
run goes on after any step with another world size, as long as the world size divides the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from featurestore.errors import StoreFormatError
from featurestore.identity import DIGEST, check_id, check_int

WINDOW_SHARDS = 64
MAX_COUNT = 2**63 - 1
_DOMAIN = b"distily-cache order v1\0"

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Position:
    """Where a run stands, before its next step: all that it needs to go on with the same order.

    digest: of the manifest. step: global batches of this epoch that are done.
    """

    digest: str
    seed: int
    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        check_id(self.digest, DIGEST, "manifest digest")
        for name in ("seed", "epoch", "step"):
            check_int(getattr(self, name), 0, MAX_COUNT, name)

    def to_json(self) -> dict[str, Any]:
        """A JSON object, for a checkpoint."""
        return {"digest": self.digest, "seed": self.seed, "epoch": self.epoch, "step": self.step}

    @classmethod
    def from_json(cls, value: object) -> Position:
        """The inverse of `to_json`; StoreFormatError for anything else."""
        if not isinstance(value, dict) or set(value) != {"digest", "seed", "epoch", "step"}:
            raise StoreFormatError("reading position: wrong or missing fields")
        return cls(**value)


def epoch_order(
    digest: str, seed: int, epoch: int, shards: Sequence[Sequence[int]], window: int = WINDOW_SHARDS
) -> Indices:
    """int64 [samples]: the samples of all `shards` (lists of indices), in the order of one epoch.

    The same arguments give the same order on every machine and for every version of numpy: keys are BLAKE3
    output, and the order is that of the keys.
    """
    if window < 1:
        raise ValueError(f"a window needs at least one shard, not {window}")
    keys = _keys(digest, seed, epoch, len(shards) + sum(len(shard) for shard in shards))
    shard_order = np.argsort(keys[: len(shards)], kind="stable")
    sample_keys = keys[len(shards) :]
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    parts: list[Indices] = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(shards), window):
        chosen = shard_order[first : first + window].tolist()
        samples = np.concatenate([np.asarray(shards[s], dtype=np.int64) for s in chosen])
        own = np.concatenate([sample_keys[starts[s] : starts[s + 1]] for s in chosen])
        parts.append(samples[np.argsort(own, kind="stable")])
    return np.concatenate(parts)


def rank_share(order: Indices, position: Position, global_batch: int, rank: int, world: int) -> Indices:
    """int64 [n]: what `rank` of `world` reads from `position` to the end of the epoch, in order.

    Step s of the epoch is order[s * global_batch : (s + 1) * global_batch], whoever reads it; a rank takes
    one contiguous share of each step. The last step may be short, and ranks may then have shares of 0.

    Raises:
        ValueError: the world size does not divide the global batch, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    if global_batch < 1 or global_batch % world:
        raise ValueError(f"a global batch of {global_batch} does not divide into {world} equal shares")
    share = global_batch // world
    place = np.arange(len(order)) % global_batch
    mine = (place >= rank * share) & (place < (rank + 1) * share)
    return order[mine & (np.arange(len(order)) >= position.step * global_batch)]


def _keys(digest: str, seed: int, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    hasher = blake3(
        _DOMAIN + bytes.fromhex(digest) + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    )
    return np.frombuffer(hasher.digest(8 * count), dtype="<u8")
