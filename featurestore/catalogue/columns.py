"""A segment as a file: flat columns in an Arrow IPC file, uncompressed, so that it can be mapped into memory.

The file is one record batch of one row, in which each column is one list: columns of different lengths (one
value per task, per sample, per file ...) lie in one file that any reader of Arrow opens. No column has
values of varying size, so nothing is unpacked, and what is read takes no more memory than the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore.errors import CorruptionError

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

# Name -> numpy dtype, or the width of raw bytes. A `<what>_start` has one more value than there are rows of
# what it cuts, the first 0 and the last the number of <what>.
LAYOUT: dict[str, str | int] = {
    "group": 32,
    "task": 8,
    "sample_start": "i8",
    "record_start": "i8",
    "sample": 16,
    "length": "i4",
    "document_start": "i8",
    "document": 8,
    "record_group": "i2",
    "record_digest": 16,
    "record_bundle": 6,
    "file_start": "i8",
    "file_size": "i8",
    "file_hash": 8,
    "stat_start": "i8",
    "stat": "f8",
    "key": "u8",
    "key_place": "i4",
    "dropped": "i4",
    "plan": 16,
}
_ARROW = {"i2": pa.int16(), "i4": pa.int32(), "i8": pa.int64(), "u8": pa.uint64(), "f8": pa.float64()}
_MAGIC = b"ARROW1"


def _item(kind: str | int) -> Any:
    return pa.binary(kind) if isinstance(kind, int) else _ARROW[kind]


SCHEMA = pa.schema(
    [
        pa.field(name, pa.list_(pa.field("item", _item(kind), nullable=False)), nullable=False)
        for name, kind in LAYOUT.items()
    ]
)


def empty(name: str, count: int = 0) -> Array:
    """A column of `count` zeros."""
    kind = LAYOUT[name]
    return np.zeros((count, kind), np.uint8) if isinstance(kind, int) else np.zeros(count, kind)


def to_bytes(columns: Columns) -> bytes:
    """The content of a segment file; columns that are bytes are uint8 [n, width]."""
    lists = []
    for name, kind in LAYOUT.items():
        values = np.ascontiguousarray(columns[name], np.uint8 if isinstance(kind, int) else kind)
        buffers = [None, pa.py_buffer(values)]
        items = pa.Array.from_buffers(_item(kind), len(values), buffers)
        lists.append(
            pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), items, SCHEMA.field(name).type)
        )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(lists, schema=SCHEMA))
    return bytes(sink.getvalue())


def from_buffer(data: Any, where: str) -> dict[str, Array]:
    """The columns of a segment file as views of `data` (bytes, or a map of the file); nothing is copied.

    CorruptionError for anything but one row of these very columns, uncompressed and without missing values.
    What the values are is for `segment.check`.
    """
    try:
        buffer = pa.py_buffer(data)
        _check_uncompressed(buffer)
        reader = pa.ipc.open_file(buffer)
        if not reader.schema.equals(SCHEMA, check_metadata=True) or reader.num_record_batches != 1:
            raise CorruptionError(f"{where}: not the columns of a segment")
        batch = reader.get_batch(0)
        if batch.num_rows != 1:
            raise CorruptionError(f"{where}: a segment is one row, not {batch.num_rows}")
        batch.validate(full=True)
        return {name: _values(batch.column(name), name, where) for name in LAYOUT}
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        if isinstance(error, CorruptionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptionError(f"{where}: not readable as Arrow IPC: {reason}") from None


def _values(column: Any, name: str, where: str) -> Array:
    kind = LAYOUT[name]
    items = column[0].values
    if column.null_count or items is None or items.null_count:
        raise CorruptionError(f"{where}: {name} has missing values")
    width = kind if isinstance(kind, int) else np.dtype(kind).itemsize
    buffer = items.buffers()[1]
    if not len(items) or buffer is None:
        return empty(name)
    raw = np.frombuffer(buffer, np.uint8, len(items) * width, items.offset * width)
    return raw.reshape(len(items), width) if isinstance(kind, int) else raw.view(kind)


def _check_uncompressed(buffer: Any) -> None:
    """ValueError for an Arrow file whose record batches are compressed, which could unpack to anything.

    Arrow unpacks a batch as soon as it is opened, so that the flatbuffers that describe it are looked at
    here before: the footer at the end names the batches, and each of these says whether it is compressed.
    """
    view = memoryview(buffer)
    if len(view) < 2 * len(_MAGIC) + 6 or bytes(view[-len(_MAGIC) :]) != _MAGIC:
        raise ValueError("no footer")
    end = len(view) - len(_MAGIC) - 4
    footer = view[max(0, end - max(0, _number(view, "<i", end))) : end]
    place = _field(footer, _root(footer), 3)
    blocks = 0 if place is None else place + _number(footer, "<I", place)
    for number in range(_number(footer, "<I", blocks) if place is not None else 0):
        start = _number(footer, "<q", blocks + 4 + 24 * number)
        if not 0 <= start <= len(view) - 8:
            raise ValueError("a batch outside of the file")
        message = view[start + 8 :]
        header = _field(message, _root(message), 2)
        if header is None or _field(message, header + _number(message, "<I", header), 3) is not None:
            raise ValueError("a compressed batch")


def _root(table: memoryview) -> int:
    return int(_number(table, "<I", 0))


def _field(data: memoryview, table: int, slot: int) -> int | None:
    """Where a field of a flatbuffer's table lies; None where it is left out."""
    vtable = table - _number(data, "<i", table)
    if 4 + 2 * slot >= _number(data, "<H", vtable):
        return None
    offset = _number(data, "<H", vtable + 4 + 2 * slot)
    return table + offset if offset else None


def _number(data: memoryview, form: str, place: int) -> int:
    if not 0 <= place <= len(data) - struct.calcsize(form):
        raise ValueError("an offset outside of the file")
    return int(struct.unpack_from(form, data, place)[0])
