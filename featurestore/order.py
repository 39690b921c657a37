"""In which order a training run reads a cache: a pure function of (manifest digest, seed, epoch).

Samples that follow one another in the cache share their files. So they are taken in blocks of as many samples
as a shard has; the blocks are permuted, cut into windows of W blocks, and the samples of each window are
permuted. Neighbours in the order come from few shards, which a reader keeps open, while the shuffle is close
to a full one (with 64 shards per window, 15.88 of the 15.94 bits of a full shuffle's entropy).

Nothing is stored: the permutation of the blocks is a keyed bijection (a Feistel network with cycle walking),
and a window is made when it is come to. So an epoch of any size begins at once, and resumes at once at any
step. Blocks have one size, whatever that of shards is, because a step's window could not be computed
otherwise.

Nothing here knows how many processes read: each takes its share of one global order, so that a run goes on
after any step with another number of them, as long as it divides the global batch.

Source: J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
from blake3 import blake3

ORDER_VERSION = 2
"""Of what `EpochOrder` gives. A run that resumes needs the version with which it began."""
WINDOW_BLOCKS = 64
_DOMAIN = b"distily-cache order v2\0"
_ROUNDS = 8

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class EpochOrder(Sequence[int]):
    """The numbers 0 to samples - 1 in the order of one epoch, computed where they are asked for.

    Args:
        digest: of the manifest.
        seed: of the run.
        epoch: from 0 on; each has an order of its own.
        samples: how many there are.
        block: how many neighbours stay together until they are mixed in a window.
        window: blocks of one window.

    The same arguments give the same order on every machine and for every version of numpy: keys are BLAKE3
    output, and the order is that of the keys.

    Example:
        order = EpochOrder(reader.manifest_digest, seed=0, epoch=0, samples=len(reader), block=64)
        for index in order.starting(1000):
            reader.read(index)
    """

    def __init__(
        self, digest: str, seed: int, epoch: int, samples: int, block: int, window: int = WINDOW_BLOCKS
    ) -> None:
        if window < 1 or block < 1:
            raise ValueError(
                f"a window needs at least one block and a block one sample, not {window}, {block}"
            )
        self._samples, self._block, self._window = samples, block, window
        self._blocks = -(-samples // block)
        self._key = _DOMAIN + bytes.fromhex(digest) + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
        self._shuffle = _Bijection(self._blocks, self._key)
        # The last block may be short: from the window that it is in on, all begin earlier.
        self._lack = self._blocks * block - samples
        self._short = int(self._shuffle.places(np.array([self._blocks - 1]))[0]) if samples else 0
        self._made: tuple[int, Indices] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, step: int) -> int: ...
    @overload
    def __getitem__(self, step: slice) -> list[int]: ...
    def __getitem__(self, step: int | slice) -> int | list[int]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        number, inside = self._place(step % len(self))
        return int(self.window(number)[inside])

    def __iter__(self) -> Iterator[int]:
        return self.starting(0)

    def starting(self, step: int) -> Iterator[int]:
        """The rest of the order, from a step on."""
        if step >= self._samples:
            return
        number, inside = self._place(step)
        while number * self._window < self._blocks:
            yield from self.window(number)[inside:].tolist()
            number, inside = number + 1, 0

    def window(self, number: int) -> Indices:
        """int64: the samples of a window, in order."""
        made = self._made
        if made[0] != number:
            first = number * self._window
            places = np.arange(first, min(first + self._window, self._blocks))
            blocks = self._shuffle.numbers(places)[:, None] * self._block
            samples = (blocks + np.arange(self._block)).reshape(-1)
            samples = samples[samples < self._samples]
            key = blake3(self._key + number.to_bytes(8, "little")).digest(8 * len(samples))
            # Bound once, since a thread may look ahead in the same order.
            self._made = made = number, samples[np.argsort(np.frombuffer(key, "<u8"), kind="stable")]
        return made[1]

    def _place(self, step: int) -> tuple[int, int]:
        """(window, place in it) of a step."""
        full = self._window * self._block
        behind = step >= (self._short // self._window + 1) * full - self._lack
        number = (step + self._lack * behind) // full
        return number, step + self._lack * behind - number * full


class _Bijection:
    """A keyed permutation of 0 to count - 1, in both directions."""

    def __init__(self, count: int, key: bytes) -> None:
        self._count = count
        self._half = max(1, -(-max(count - 1, 1).bit_length() // 2))
        self._mask = np.uint64(2**self._half - 1)
        self._keys = np.frombuffer(blake3(key + b"blocks").digest(8 * _ROUNDS), "<u8").astype(np.uint64)

    def numbers(self, places: Indices) -> Indices:
        """int64: the numbers at these places."""
        return self._walk(places, self._keys, forward=True)

    def places(self, numbers: Indices) -> Indices:
        """int64: the places of these numbers."""
        return self._walk(numbers, self._keys[::-1], forward=False)

    def _walk(self, values: Indices, keys: _Words, forward: bool) -> Indices:
        """A Feistel network permutes 0 to 4^half - 1; what falls out of the range goes through it again."""
        out = values.astype(np.uint64)
        left = np.arange(len(out))
        while len(left):
            out[left] = self._once(out[left], keys, forward)
            left = left[out[left] >= self._count]
        return out.astype(np.int64)

    def _once(self, values: _Words, keys: _Words, forward: bool) -> _Words:
        shift = np.uint64(self._half)
        a, b = values >> shift, values & self._mask
        for key in keys:
            if forward:
                a, b = b, a ^ (_mixed(b + key) & self._mask)
            else:
                a, b = b ^ (_mixed(a + key) & self._mask), a
        joined: _Words = (a << shift) | b
        return joined


def _mixed(words: _Words) -> _Words:
    """The finaliser of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
