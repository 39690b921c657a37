"""Reading and writing one array: Zarr v3, one shard, a crc32c behind every inner chunk.

zarr-python writes. Reading goes straight to the bytes of the inner chunks: a sample needs eight small
slices, and zarr-python's general path costs about 0.7 ms for each, this one about 0.05 ms. It also
refuses a missing chunk, which zarr would fill with zeros, and any size that the layout does not imply.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc  # type: ignore[import-untyped]

from featurestore.columns import ArrayLayout, shard_key
from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.files import read_bounded
from featurestore.identity import check_int

Array = npt.NDArray[Any]

MAX_METADATA_BYTES = 2**16
MAX_CHUNK_BYTES = 2**27
CRC_BYTES = 4
EMPTY_CHUNK: Final = 2**64 - 1
BYTES_CODEC = {"name": "bytes", "configuration": {"endian": "little"}}
CRC_CODEC = {"name": "crc32c"}

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

    with warnings.catch_warnings():
        # A dtype whose Zarr specification is still a draft would warn; ours are all in the v3 core.
        warnings.simplefilter("error", category=FutureWarning)
        group = zarr.create_group(str(directory), zarr_format=3, attributes=dict(attributes))
        for name, layout in layouts.items():
            data = arrays[name]
            assert data.shape == layout.shape and data.dtype == layout.dtype, name
            rows = layout.shape[0]
            chunk_rows = min(layout.chunk_rows, rows)
            squeeze = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=layout.dtype.itemsize)
            array = group.create_array(
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
            array[...] = data


class ShardArray:
    """One committed array, read by rows. Holds its chunk index in memory and no open file.

    Raises CorruptionError when bytes are not as written, StoreFormatError for a layout other than the
    column group's.
    """

    def __init__(self, directory: Path, layout: ArrayLayout) -> None:
        self.layout = layout
        self.path = directory / shard_key(layout)
        self.chunk_rows, self._squeezed = _read_metadata(directory / "zarr.json", layout)
        self._chunk_shape = (self.chunk_rows, *layout.shape[1:])
        self._chunk_bytes = math.prod(self._chunk_shape) * layout.dtype.itemsize
        if self._chunk_bytes > MAX_CHUNK_BYTES:
            raise StoreFormatError(f"{directory}: an inner chunk of {self._chunk_bytes} bytes is too large")
        self._dtype = layout.dtype.newbyteorder("<")
        self._offsets, self._sizes = self._read_index()

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as a new array; only the inner chunks that hold them are read."""
        rows = self.layout.shape[0]
        if not 0 <= start < stop <= rows:
            raise CorruptionError(f"{self.path}: rows {start}:{stop} asked of {rows}")
        out = np.empty((stop - start, *self.layout.shape[1:]), dtype=self.layout.dtype)
        step = self.chunk_rows
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CorruptionError(f"{self.path}: {error.strerror}") from None
        try:
            for i in range(start // step, (stop - 1) // step + 1):
                low, high = max(start, i * step), min(stop, (i + 1) * step)
                out[low - start : high - start] = self._chunk(descriptor, i)[low - i * step : high - i * step]
        finally:
            os.close(descriptor)
        return out

    def _chunk(self, descriptor: int, i: int) -> Array:
        size = self._sizes[i]
        data = memoryview(os.pread(descriptor, size, self._offsets[i]))
        body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(data) != size or int.from_bytes(crc, "little") != google_crc32c.value(bytes(body)):
            raise CorruptionError(f"{self.path}: checksum of inner chunk {i} does not match")
        if self._squeezed:
            # The blosc header says how much memory unpacking takes; believe it only if it is the layout's.
            sizes = np.frombuffer(body[4:16], "<u4") if len(body) >= 16 else [0, 0, 0]
            if int(sizes[0]) != self._chunk_bytes or int(sizes[2]) != len(body):
                raise CorruptionError(f"{self.path}: inner chunk {i} claims another size than its array's")
            try:
                body = blosc.decompress(body)
            except RuntimeError:
                raise CorruptionError(f"{self.path}: inner chunk {i} cannot be decompressed") from None
        if len(body) != self._chunk_bytes:
            raise CorruptionError(f"{self.path}: inner chunk {i} has {len(body)} bytes")
        return np.frombuffer(body, self._dtype).reshape(self._chunk_shape)

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
