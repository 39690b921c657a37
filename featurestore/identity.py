"""Identity by content: canonical JSON, digests, sealed records, and the shapes that ids may have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from featurestore.errors import CorruptionError, StoreFormatError

FORMAT = "distily-cache"
VERSION = 1
# The newest version of a kind of record, where it is not VERSION. All versions up to it are read.
NEWEST = {"manifest": 2}
SEAL = "blake3"

SAMPLE_ID = re.compile(r"[0-9a-f]{32}")
TASK_ID = re.compile(r"[0-9a-f]{16}")
RUN_ID = re.compile(r"[0-9a-f]{16}")
BUNDLE_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{12}")
DIGEST = re.compile(r"[0-9a-f]{32}")
HASH = re.compile(r"[0-9a-f]{16}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
SAMPLES = "samples"
# Bytes that a sealed record of a kind may have; the others grow with the store, and are bounded where
# they are read.
RECORD_BYTES = {"spec": 2**16, "commit": 2**16, "teacher": 2**20, "sidecar": 2**20, "provenance": 2**23}
# Parsed, a list or an object takes some 60 bytes. Those of a record hold an id at least, of 16 characters.
_BYTES_PER_CONTAINER, _SMALL_RECORD = 16, 2**16


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: keys sorted, no spaces, ASCII only, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(data: bytes | Iterable[bytes], hex_digits: int = 32) -> str:
    """The first `hex_digits` hex digits of the BLAKE3 hash of bytes, or of the join of several."""
    hasher = blake3()
    for part in (data,) if isinstance(data, bytes) else data:
        hasher.update(part)
    return hasher.hexdigest()[:hex_digits]


def seal(record: dict[str, Any]) -> bytes:
    """Canonical JSON of `record` plus a field `blake3` over the rest, so that one flipped bit shows."""
    return canonical_json({**record, SEAL: digest(canonical_json(record))}) + b"\n"


def unseal(data: bytes, where: str, kind: str) -> dict[str, Any]:
    """Parse and check a sealed record of format `distily-cache/<kind>`; the seal is taken off.

    Raises StoreFormatError for another format or a version that is not ours, CorruptionError for a
    broken seal, for bytes that are no JSON at all, and for more of them than such a record has.
    """
    _check_size(data, where, kind)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptionError(f"{where}: not readable as JSON; the file is damaged") from None
    expected = f"{FORMAT}/{kind}"
    if not isinstance(record, dict) or SEAL not in record or "format" not in record:
        raise CorruptionError(f"{where}: not a sealed {expected} record; the file is damaged or foreign")
    version = record.get("version")
    newest = NEWEST.get(kind, VERSION)
    if record["format"] == expected and type(version) is int and version > newest:
        raise StoreFormatError(
            f"{where}: format version {version}, but this distily-cache reads up to {newest}; upgrade it"
        )
    stored = record.pop(SEAL)
    try:
        sound = stored == digest(canonical_json(record)) and seal(record) == data
    except ValueError:
        sound = False
    if not sound:
        raise CorruptionError(f"{where}: its blake3 seal does not match; the file is damaged")
    if record["format"] != expected or type(version) is not int or not VERSION <= version <= newest:
        raise StoreFormatError(f"{where}: expected {expected} version {newest}, found {record['format']!r}")
    return record


def _check_size(data: bytes, where: str, kind: str) -> None:
    """CorruptionError for JSON that takes many times its size in memory, or is larger than its kind is."""
    limit = RECORD_BYTES.get(kind)
    if limit is not None and len(data) > limit:
        raise CorruptionError(f"{where}: {len(data):,} bytes; a {kind} record has {limit:,} at most")
    containers = data.count(b"[") + data.count(b"{") if limit is None else 0
    if containers * _BYTES_PER_CONTAINER > len(data) + _SMALL_RECORD:
        raise CorruptionError(
            f"{where}: {containers:,} lists and objects in {len(data):,} bytes are no {kind} record"
        )


def header(kind: str) -> dict[str, Any]:
    """The two fields that every record starts with."""
    return {"format": f"{FORMAT}/{kind}", "version": NEWEST.get(kind, VERSION)}


def check_id(value: object, pattern: re.Pattern[str], where: str) -> str:
    """`value` if it is a string that the whole pattern matches, else StoreFormatError."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise StoreFormatError(f"{where}: invalid name {str(value)[:80]!r}")
    return value


def check_int(value: object, low: int, high: int, where: str) -> int:
    """`value` if it is an int (no bool) in [low, high], else StoreFormatError."""
    if type(value) is not int or not low <= value <= high:
        raise StoreFormatError(f"{where}: expected an integer in [{low}, {high}], found {str(value)[:80]}")
    return value
