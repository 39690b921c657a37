"""Reading and writing one array: Zarr v3, one shard, a crc32c behind every inner chunk.

zarr-python writes the metadata. The inner chunks are written and read here: to write a shard by zarr-python
takes four times as long as its compression (benchmarks/results/capture_overhead.md), and of the eight small
slices that a sample needs its general path costs about 0.7 ms each, this one about 0.05 ms. Reading also
refuses a missing chunk, which zarr would fill with zeros, and any size that the layout does not imply.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc, blosc  # type: ignore[import-untyped]

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.columns import ArrayLayout, shard_key
from featurestore.identity import check_int
from featurestore.storage.files import read_bounded

Array = npt.NDArray[Any]

MAX_METADATA_BYTES = 2**16
MAX_CHUNK_BYTES = 2**27
# What the codecs of this format can make of 64 KiB of one value, and what a small array may have beyond that.
MAX_RATIO, SMALL_BYTES = 1024, 2**24
CRC_BYTES = 4
EMPTY_CHUNK: Final = 2**64 - 1
BYTES_CODEC = {"name": "bytes", "configuration": {"endian": "little"}}
CRC_CODEC = {"name": "crc32c"}

_LEVEL = 5

# As zarr-python does when it is imported: blosc's own threads do not survive a fork into a worker.
blosc.use_threads = False


def write_group(
    directory: Path,
    attributes: Mapping[str, Any],
    layouts: Mapping[str, ArrayLayout],
    arrays: Mapping[str, Array],
) -> None:
    """Write a new Zarr v3 group with these arrays. Nothing is synced here."""
    import zarr  # 0.4 s that readers do not need
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    group = zarr.create_group(str(directory), zarr_format=3, attributes=dict(attributes))
    for name, layout in layouts.items():
        data = arrays[name]
        assert data.shape == layout.shape and data.dtype == layout.dtype, name
        rows = layout.shape[0]
        chunk_rows = min(layout.chunk_rows, rows)
        squeeze = BloscCodec(cname="zstd", clevel=_LEVEL, shuffle="shuffle", typesize=layout.dtype.itemsize)
        group.create_array(
            name,
            shape=layout.shape,
            dtype=layout.dtype,
            chunks=(chunk_rows, *layout.shape[1:]),
            shards=(-(-rows // chunk_rows) * chunk_rows, *layout.shape[1:]),
            filters=None,
            serializer=BytesCodec(endian="little" if layout.dtype.itemsize > 1 else None),
            compressors=[squeeze, Crc32cCodec()] if layout.compressed else [Crc32cCodec()],
            fill_value=0,
            attributes=dict(layout.attributes),
            config={"write_empty_chunks": True},
        )
        _write_shard(directory / name / shard_key(layout), data, chunk_rows, layout.compressed)


def _write_shard(path: Path, data: Array, chunk_rows: int, compressed: bool) -> None:
    """The bytes that zarr-python writes for `data`: inner chunks in order, each with its crc32c, then the
    index of their offsets and sizes with its own.
    """
    codec = Blosc("zstd", _LEVEL, Blosc.SHUFFLE) if compressed else None
    data = data.astype(data.dtype.newbyteorder("<"), copy=False)
    index, offset = [], 0
    path.parent.mkdir(parents=True)
    with path.open("xb") as file:
        for start in range(0, len(data), chunk_rows):
            chunk = np.ascontiguousarray(data[start : start + chunk_rows])
            if len(chunk) < chunk_rows:  # the last one is filled up with the fill value
                chunk = np.concatenate(
                    [chunk, np.zeros((chunk_rows - len(chunk), *chunk.shape[1:]), data.dtype)]
                )
            if codec is None:
                body = chunk.reshape(-1).view(np.uint8)
            else:
                body = np.frombuffer(codec.encode(chunk), np.uint8)
            file.write(body.data)
            file.write(_checksum(body))
            index.append((offset, len(body) + CRC_BYTES))
            offset += len(body) + CRC_BYTES
        places = np.array(index, "<u8").reshape(-1).view(np.uint8)
        file.write(places.data)
        file.write(_checksum(places))


def _checksum(data: Array) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


class ChunkCache:
    """Unpacked inner chunks of many arrays, the least recently used leaving first: at most `limit` bytes.

    Samples are read in a shuffled order, and a chunk holds rows of several samples.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self._limit, self._size = limit, 0
        self._chunks: OrderedDict[tuple[int, int], Array] = OrderedDict()

    def get(self, key: tuple[int, int]) -> Array | None:
        """The chunk under `key` (number of an array, number of a chunk), if it is still there."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._chunks.move_to_end(key)
        return chunk

    def put(self, key: tuple[int, int], chunk: Array) -> None:
        """Keep a chunk that is not there yet."""
        self._chunks[key] = chunk
        self._size += chunk.nbytes
        while self._size > self._limit:
            self._size -= self._chunks.popitem(last=False)[1].nbytes


class ShardArray:
    """One committed array, read by rows. Holds its chunk index in memory and no open file.

    Chunks that were unpacked stay in `cache`, those stored as they are do not: the system caches their file.
    `decode` is applied to each chunk as it is read (IndexError: it is damaged), and what it makes of the rows
    is read instead.

    Raises CorruptionError when bytes are not as written, StoreFormatError for a layout other than the
    column group's.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        directory: Path,
        layout: ArrayLayout,
        cache: ChunkCache | None = None,
        decode: Callable[[Array], Array] | None = None,
    ) -> None:
        self.layout = layout
        self.path = directory / shard_key(layout)
        self.chunk_rows, self._squeezed = _read_metadata(directory / "zarr.json", layout)
        self._chunk_shape = (self.chunk_rows, *layout.shape[1:])
        self._chunk_bytes = math.prod(self._chunk_shape) * layout.dtype.itemsize
        if self._chunk_bytes > MAX_CHUNK_BYTES:
            raise StoreFormatError(f"{directory}: an inner chunk of {self._chunk_bytes} bytes is too large")
        self._dtype = layout.dtype.newbyteorder("<")
        self._offsets, self._sizes = self._read_index()
        self._cache = cache if self._squeezed else None
        self._number = next(self._numbers)
        self._decode = decode

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop), read-only where they are one chunk's; only their inner chunks are read."""
        rows, step = self.layout.shape[0], self.chunk_rows
        if not 0 <= start < stop <= rows:
            raise CorruptionError(f"{self.path}: rows {start}:{stop} asked of {rows}")
        first, last = start // step, (stop - 1) // step
        if first == last:
            return self._chunk(first)[start - first * step : stop - first * step]
        parts = [self._chunk(i) for i in range(first, last + 1)]
        parts[0], parts[-1] = parts[0][start - first * step :], parts[-1][: stop - last * step]
        return np.concatenate(parts)

    def _chunk(self, i: int) -> Array:
        """Inner chunk i, decoded, from the cache if it is there."""
        chunk = None if self._cache is None else self._cache.get((self._number, i))
        if chunk is None:
            chunk = self._read_chunk(i)
            if self._decode is not None:
                try:
                    chunk = self._decode(chunk)
                except IndexError:
                    raise CorruptionError(f"{self.path}: an index outside the task's vocabulary") from None
            if self._cache is not None:
                self._cache.put((self._number, i), chunk)
        return chunk

    def _read_chunk(self, i: int) -> Array:
        size = self._sizes[i]
        # An array, because the checksum takes no memoryview and slices of bytes are copies.
        data = np.frombuffer(self._pread(size, self._offsets[i]), np.uint8)
        body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(data) != size or int.from_bytes(crc.tobytes(), "little") != google_crc32c.value(body):
            raise CorruptionError(f"{self.path}: checksum of inner chunk {i} does not match")
        if self._squeezed:
            # The blosc header says how much memory unpacking takes; believe it only if it is the layout's.
            sizes = body[4:16].view("<u4") if len(body) >= 16 else [0, 0, 0]
            if int(sizes[0]) != self._chunk_bytes or int(sizes[2]) != len(body):
                raise CorruptionError(f"{self.path}: inner chunk {i} claims another size than its array's")
            try:
                body = np.frombuffer(blosc.decompress(body), np.uint8)
            except RuntimeError:
                raise CorruptionError(f"{self.path}: inner chunk {i} cannot be decompressed") from None
        if len(body) != self._chunk_bytes:
            raise CorruptionError(f"{self.path}: inner chunk {i} has {len(body)} bytes")
        return body.view(self._dtype).reshape(self._chunk_shape)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CorruptionError(f"{self.path}: {error.strerror}") from None
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _read_index(self) -> tuple[list[int], list[int]]:
        """(offset, size) of every inner chunk: uint64 pairs and a crc32c at the end of the shard."""
        chunks = -(-self.layout.shape[0] // self.chunk_rows)
        length = 16 * chunks + CRC_BYTES
        try:
            with self.path.open("rb") as file:
                end = file.seek(0, os.SEEK_END) - length
                data = b"" if end < 0 else (file.seek(end), file.read(length))[1]
        except OSError as error:
            raise CorruptionError(f"{self.path}: {error.strerror}") from None
        crc = int.from_bytes(data[-CRC_BYTES:], "little")
        if len(data) != length or crc != google_crc32c.value(data[:-CRC_BYTES]):
            raise CorruptionError(f"{self.path}: checksum of the shard index does not match")
        index = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(chunks, 2)
        if (index == EMPTY_CHUNK).any():
            raise CorruptionError(f"{self.path}: an inner chunk is missing")
        if (index > end).any() or (index.sum(axis=1) > end).any() or (index[:, 1] <= CRC_BYTES).any():
            raise CorruptionError(f"{self.path}: the shard index points outside the file")
        # Chunks that shared their bytes would let a small file unpack to any size.
        starts = index[np.argsort(index[:, 0], kind="stable")]
        if (starts[:-1].sum(axis=1) > starts[1:, 0]).any():
            raise CorruptionError(f"{self.path}: inner chunks overlap")
        unpacked = chunks * self._chunk_bytes
        if unpacked > MAX_RATIO * end + SMALL_BYTES:
            raise CorruptionError(
                f"{self.path}: claims to unpack to {unpacked:,} bytes from {end:,}; "
                "the file is damaged or was made to harm"
            )
        return index[:, 0].tolist(), index[:, 1].tolist()


def _read_metadata(path: Path, layout: ArrayLayout) -> tuple[int, bool]:
    """Check zarr.json against the layout; returns (rows of an inner chunk, whether blosc is used)."""
    try:
        meta = json.loads(read_bounded(path, MAX_METADATA_BYTES))
        rows = layout.shape[0]
        sharding = meta["codecs"][0]["configuration"]
        chunk_rows = check_int(sharding["chunk_shape"][0], 1, rows, f"{path}: inner chunk")
        inner, rest = sharding["codecs"], list(layout.shape[1:])
        shard = [-(-rows // chunk_rows) * chunk_rows, *rest]
        serializer = BYTES_CODEC if layout.dtype.itemsize > 1 else {"name": "bytes"}
        squeezed = len(inner) == 3 and inner[1]["name"] == "blosc"
        as_expected = (
            meta["zarr_format"] == 3
            and meta["node_type"] == "array"
            and meta["shape"] == list(layout.shape)
            and meta["data_type"] == layout.dtype.name
            and meta["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": shard}}
            and meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and len(meta["codecs"]) == 1
            and meta["codecs"][0]["name"] == "sharding_indexed"
            and sharding["chunk_shape"] == [chunk_rows, *rest]
            and sharding["index_codecs"] == [BYTES_CODEC, CRC_CODEC]
            and sharding["index_location"] == "end"
            and inner == [serializer, *([inner[1]] if squeezed else []), CRC_CODEC]
        )
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise StoreFormatError(f"{path}: not the metadata of an array of this format ({error})") from None
    if not as_expected:
        raise StoreFormatError(f"{path}: shape, dtype or codecs are not those of this column group")
    return chunk_rows, squeezed
