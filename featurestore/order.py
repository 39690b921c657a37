"""In which order a training run reads a cache: a pure function of (manifest digest, seed, epoch).

The shards of the manifest are permuted, cut into windows of W shards, and the samples of each window are
permuted. So neighbours in the order come from at most W shards, which a reader keeps open, while the shuffle
is close to a full one (with 64 shards per window, 15.88 of the 15.94 bits of a full shuffle's entropy).

Nothing here knows how many processes read: each takes its share of one global order, so that a run goes on
after any step with another number of them, as long as it divides the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from blake3 import blake3

WINDOW_SHARDS = 64
_DOMAIN = b"distily-cache order v1\0"

Indices = npt.NDArray[np.int64]


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


def _keys(digest: str, seed: int, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    hasher = blake3(
        _DOMAIN + bytes.fromhex(digest) + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    )
    return np.frombuffer(hasher.digest(8 * count), dtype="<u8")
