"""Files of data as people keep them: their kinds, what they are packed with, and their rows one by one.

Both stages read such files: stage 1 to make samples of them, the evaluation to measure models on them. A path
is a path here, never a pattern or a URL. Nothing is kept between two readings.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from blake3 import blake3

from distily.errors import DataFileError
from distily.safety.parquet import check_parquet
from distily.text import one_line

# Suffix -> kind of content.
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
# A second suffix behind one of these.
PACKED = (".gz", ".zst", ".bz2")
UNDERSTOOD = f"{', '.join(KINDS)}, each also with {', '.join(PACKED)} behind it"
_BLOCK = 1 << 20
# What a compressed file may unpack to, in its own size and beside it: gzip cannot do better, and text that
# zstd or bzip2 packs better is one line over and over.
_RATIO, _SPARE = 1032, 1 << 26


def kind_of(path: Path) -> str | None:
    """What is in a file by its name, e.g. `json` of `part.jsonl.zst`; None for an unknown kind."""
    name = path.name.lower()
    packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return KINDS.get(Path(name.removesuffix(packing)).suffix)


def is_packed(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.name.lower().endswith(PACKED)


def digest_of(path: Path) -> str:
    """A hash of the bytes of a file.

    Raises:
        DataFileError: it cannot be read.
    """
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    except OSError as error:
        raise DataFileError(error.strerror or str(error)) from error


def open_unpacked(path: Path) -> IO[bytes]:
    """The content as a file that can be sought in; what is packed goes to an unnamed temporary file first.

    Raises:
        DataFileError: it cannot be read, or is not whole.
    """
    if is_packed(path):
        target = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        unpack(path, target)
        target.seek(0)
        return target
    try:
        return path.open("rb")
    except OSError as error:
        raise DataFileError(error.strerror or str(error)) from error


def unpack(path: Path, target: IO[bytes]) -> None:
    """Write the content of a compressed file to `target`, a block at a time.

    Raises:
        DataFileError: it cannot be read, is not whole, or unpacks to more than data do.
    """
    try:
        with path.open("rb") as raw, _unpacking(raw, path.suffix.lower()) as source:
            left = _RATIO * path.stat().st_size + _SPARE
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise DataFileError(
                        f"it unpacks to more than {_RATIO:,} times its size, as no data do; unpack it "
                        "yourself if it is what you want"
                    )
                target.write(block)
    except DataFileError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # gzip, bz2 and pyarrow have four ways to say that a stream is cut or is none.
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataFileError(f"not whole, or not what its name says ({' '.join(said.split())})") from error


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        DataFileError: it cannot be read, is not whole or is not UTF-8.
    """
    with open_unpacked(path) as file:
        try:
            # utf-8-sig: a byte order mark is no part of the text.
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
        except UnicodeDecodeError as error:
            raise DataFileError(f"not UTF-8 text (byte {error.start}); convert it first") from error
        except OSError as error:
            raise DataFileError(error.strerror or str(error)) from error


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of any kind but text, a few of them in memory at a time (of a JSON array all).

    Raises:
        DataFileError: it cannot be read, or a row of it cannot.
    """
    with RowFile(path) as rows:
        for number, row in enumerate(rows):
            if isinstance(row, Exception):
                raise DataFileError(f"row {number} is no JSON: {row}")
            if not isinstance(row, dict):
                raise DataFileError(f"row {number} is no JSON object")
            yield row


class RowFile:
    """The rows of one file of any kind but text, from the first to the last, a few of them in memory at a
    time (of a JSON array all); what is packed is unpacked on the way.

    Iterating gives dictionaries; in the place of a JSON line that is none, its value or the ValueError that
    says why it is no JSON. columns: of Parquet and Arrow files, the ones to read.

    Raises:
        DataFileError: while it is opened or iterated: it cannot be read, or is not whole.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None) -> None:
        self._path, self._kind, self._columns = path, kind_of(path), columns
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DataFileError(error.strerror or str(error)) from error

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def bytes_read(self) -> int:
        """How far the file was read."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[Any]:
        try:
            if self._kind in ("json", "csv", "tsv"):
                yield from self._lines()
            elif is_packed(self._path):
                with open_unpacked(self._path) as file:
                    yield from _arrow_rows(file, self._kind, self._columns)
            else:
                yield from _arrow_rows(self._raw, self._kind, self._columns)
        except (OSError, EOFError, zlib.error) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataFileError(f"not whole, or not what its name says ({one_line(said)})") from error

    def _lines(self) -> Iterator[Any]:
        file: Any = self._raw
        if is_packed(self._path):
            file = io.BufferedReader(cast(Any, _unpacking(self._raw, self._path.suffix.lower())), _BLOCK)
        if self._kind != "json":
            yield from _csv_rows(file, "," if self._kind == "csv" else "\t")
            return
        if file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _parsed_array(file)
            return
        for line in file:
            if line.strip():
                try:
                    yield parse_line(line)
                except (ValueError, RecursionError) as error:
                    yield error


def json_array(file: IO[bytes]) -> list[Any] | None:
    """The content when it is one JSON array, None when it is not; the file stays where it is.

    Raises:
        DataFileError: it begins as an array and is none.
    """
    place = file.tell()
    start = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(place)
    if not start.startswith(b"["):
        return None
    rows = _parsed_array(file)
    file.seek(place)
    return rows


def _parsed_array(file: IO[bytes]) -> list[Any]:
    try:
        return cast(list[Any], json.loads(file.read().decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"it begins as a JSON array and is none: {error}") from error


def parse_line(line: bytes) -> Any:
    """One line of JSON.

    Raises:
        ValueError: it is none.
    """
    return json.loads(line.removeprefix(b"\xef\xbb\xbf"))


def csv_columns(file: IO[bytes], delimiter: str) -> list[str]:
    """The names in the first line of a table of text."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        return next(csv.reader(text, delimiter=delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFileError(str(error)) from error
    finally:
        text.detach()


def _unpacking(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    import pyarrow as pa

    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))


def _csv_rows(file: IO[bytes], delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a whole document may stand in one cell
    try:
        yield from csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFileError(str(error)) from error


def _arrow_rows(
    file: IO[bytes], kind: str | None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        check_parquet(file)
    try:
        if kind == "parquet":
            table = pq.ParquetFile(file)
            batches = table.iter_batches(256, columns=_present(columns, table.schema_arrow.names))
        else:
            read = _ipc_batches(file)
            batches = (batch.select(_present(columns, batch.schema.names)) for batch in read)
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataFileError(one_line(error, None)) from error


def _present(columns: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    return [name for name in names if columns is None or name in columns]


def _ipc_batches(file: IO[bytes]) -> Iterator[Any]:
    """Of the file format, or of the stream that `datasets` writes."""
    import pyarrow as pa

    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        yield from pa.ipc.open_stream(file)
        return
    reader = pa.ipc.open_file(file)
    yield from map(reader.get_batch, range(reader.num_record_batches))
