"""Parquet files of others: what their row groups would take in memory, before any of them is decoded.

Readers decode a row group, or a column of it, at once. What that takes is neither the size of the file nor
what its footer says: a page of some kilobytes may unpack to gigabytes, a run of one value may be as long as
it likes, and each value may stand for a long text of the column's dictionary.
"""

from __future__ import annotations

import mmap
from typing import IO, TYPE_CHECKING, Any

from distily.errors import DataFileError
from distily.safety.parquet_pages import check_claims, pages_of
from distily.text import one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# What a column of a row group may unpack to, in its own compressed size and beside it. Text and numbers that
# pack better are the same over and over.
_RATIO, _SPARE = 1032, 2**26
# Values of a column of a row group, beside eight for each byte of its pages: a run of one takes no place.
_VALUES = 2**25
# Bytes that the texts of a column of a row group come to: no Arrow array of texts holds more.
_TEXTS = 2**31
_DICTIONARIES = frozenset({2, 8})
# DELTA_BYTE_ARRAY repeats the beginning of the text before.
_PREFIXES = 7


def check_parquet(opened: IO[bytes]) -> None:
    """Refuse a file whose row groups would take far more memory than the file says.

    Args:
        opened: the file, on a disk; it is left at its beginning.

    Raises:
        DataFileError: that, or the file is no Parquet; the message is the reason, without the name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with (
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
            pq.ParquetFile(opened) as file,
        ):
            for group in range(file.metadata.num_row_groups):
                for column in range(file.metadata.num_columns):
                    _check_column(file, data, group, column)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataFileError(f"not readable as Parquet: {one_line(error, None)}") from error
    opened.seek(0)


def _check_column(file: pq.ParquetFile, data: Any, group: int, column: int) -> None:
    chunk = file.metadata.row_group(group).column(column)
    size = _RATIO * chunk.total_compressed_size + _SPARE
    found = unpacked = coded = dictionary = 0
    for page in pages_of(data, chunk):
        unpacked += page.unpacked
        if page.dictionary:
            dictionary += page.unpacked
        else:
            found += page.values
            coded += page.values if page.encoding in _DICTIONARIES else 0
            if page.encoding == _PREFIXES:
                coded, dictionary = coded + page.values, dictionary + page.unpacked
        check_claims(found, unpacked, _VALUES + 8 * unpacked, size)
    # Most columns repeat short words, or few texts; only of the others is it counted what they come to.
    if chunk.physical_type == "BYTE_ARRAY" and coded * dictionary > _TEXTS:
        texts = _bytes_of_texts(file.metadata, data, group, chunk.path_in_schema)
        if texts > _TEXTS:
            raise ValueError(
                f"the texts of {chunk.path_in_schema} come to {texts:,} bytes in one row group, of "
                f"{chunk.total_compressed_size:,} bytes; write it with smaller row groups"
            )


def _bytes_of_texts(metadata: Any, data: Any, group: int, name: str) -> int:
    """Of a column, which is read as numbers of texts and the texts themselves, each once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(
        pa.BufferReader(pa.py_buffer(data)), read_dictionary=[name], metadata=metadata
    ) as file:
        table = file.read_row_group(group, columns=[name], use_threads=False)
    return sum(_length(chunk) for chunk in table.column(0).chunks)


def _length(array: Any) -> int:
    """Bytes of all texts in an array, which may hold them in lists and objects."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(pc.take(lengths.cast(pa.int64()), array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_length, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _length(array.flatten())
    if pa.types.is_map(kind):
        return _length(array.keys) + _length(array.items)
    return int(array.nbytes)
