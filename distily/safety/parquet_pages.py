"""What the pages of a Parquet file would take in memory, from their headers, before any page is unpacked.

The sums in a Parquet footer are claims: a page of a few bytes may unpack to 2 GiB, or repeat one value 2^31
times, whatever the footer says, and Arrow allocates what the page asks for. So the headers themselves are
read here, in the same order as Arrow reads them. They are Thrift structs in the compact protocol
(github.com/apache/thrift, thrift-compact-protocol.md; fields in parquet-format, parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# Fields of PageHeader, and of its DataPageHeader, DictionaryPageHeader and DataPageHeaderV2.
_TYPE, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8
_KINDS = {0: _DATA, 2: _DICTIONARY, 3: _DATA_V2}
_VALUES = 1
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
# PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY. DELTA_BYTE_ARRAY would build long strings of few bytes.
_ENCODINGS = frozenset({0, 2, 3, 8})
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12
_DEEPEST = 8
_MOST_PAGES = 2**20


class _Header:
    """A reader of Thrift structs at a place in `data`. Raises ValueError for nonsense."""

    def __init__(self, data: Any, place: int, end: int) -> None:
        self.data, self.place, self.end = data, place, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Field id -> value, of integers and structs; other fields are passed over."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            value = self._value(head & 15, depth, in_list=False)
            if value is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int, in_list: bool) -> Any:
        if depth > _DEEPEST:
            raise ValueError("nested too deep")
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_TRUE, _FALSE, _BYTE):
            # A boolean field is its type; elsewhere it is a byte.
            self._skip(1 if in_list or kind == _BYTE else 0)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._unsigned())
        elif kind in _LISTS:
            head = self._byte()
            size = head >> 4 if head >> 4 != 15 else self._unsigned()
            for _ in range(min(size, self.end - self.place + 1)):
                self._value(head & 15, depth + 1, in_list=True)
        else:
            raise ValueError("unknown type of field")
        return None

    def _byte(self) -> int:
        self._skip(1)
        return int(self.data[self.place - 1])

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of too many bytes")

    def _zigzag(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, size: int) -> None:
        if self.place + size > self.end:
            raise ValueError("ends too early")
        self.place += size


class Page(NamedTuple):
    """What the header of a page says. values: of lists their elements. unpacked: bytes that it becomes."""

    dictionary: bool
    encoding: int
    values: int
    unpacked: int


def pages_of(data: Any, chunk: Any) -> Iterator[Page]:
    """The pages of one column chunk, from their headers alone.

    Args:
        data: the whole file, as bytes or mapped.
        chunk: pyarrow's ColumnChunkMetaData.

    Raises:
        ValueError: it has no pages there, or what no page says.
    """
    starts = [place for place in (chunk.dictionary_page_offset, chunk.data_page_offset) if place]
    place = min(starts, default=0)
    end = place + chunk.total_compressed_size
    if not 0 < place <= end <= len(data):
        raise ValueError("its columns lie outside of the file")
    for _ in range(_MOST_PAGES):
        if place >= end:
            return
        header = _Header(data, place, end)
        try:
            found = header.struct()
            more, packed = found[_UNPACKED], found[_PACKED]
            kind = _KINDS[found[_TYPE]]
            count, encoding = found[kind][_VALUES], found[kind][_ENCODING[kind]]
        except (ValueError, KeyError, TypeError):
            raise ValueError("not readable as Parquet: a broken page header") from None
        if min(more, packed, count) < 0:
            raise ValueError("a page of a negative size")
        yield Page(kind == _DICTIONARY, encoding, count, more)
        place = header.place + packed
    raise ValueError("a column of too many pages")


def check_pages(data: bytes, chunk: Any, values: int, size: int) -> tuple[int, int]:
    """(values, bytes) that the pages of one column chunk of a store's table unpack to.

    Args:
        data: the whole file.
        chunk: pyarrow's ColumnChunkMetaData.
        values: how many values it may have; a list counts as its elements.
        size: how many bytes its pages may unpack to.

    Raises:
        ValueError: the pages claim more than that, or are no pages of such a table.
    """
    found = unpacked = 0
    for page in pages_of(data, chunk):
        if page.encoding not in _ENCODINGS:
            raise ValueError("a page of a kind that no writer of this format makes")
        unpacked += page.unpacked
        found += 0 if page.dictionary else page.values
        check_claims(found if not page.dictionary else max(found, page.values), unpacked, values, size)
    return found, unpacked


def check_claims(found: int, unpacked: int, values: int, size: int) -> None:
    """ValueError for more values, or more bytes, than are possible."""
    if unpacked > size or found > values:
        raise ValueError(
            f"its pages claim to unpack to {unpacked:,} bytes and {found:,} values, {size:,} and {values:,} "
            "are possible; the file is damaged or was made to harm"
        )
