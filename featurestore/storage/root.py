"""The root of a store by its path: a local directory, or a URL in an object store."""

from __future__ import annotations

import re
from pathlib import Path

from distily.safety.redaction import redact
from featurestore.errors import StoreFormatError
from featurestore.storage.local import LocalRoot
from featurestore.storage.protocol import Root

SCHEMES = ("s3", "gs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(path: str | Path) -> bool:
    """Is this in an object store (or meant to be)."""
    return bool(_URL.match(_spelling(path)))


def root_of(path: str | Path) -> Root:
    """The root at a directory or a URL; StoreFormatError for a URL that we cannot serve."""
    text = _spelling(path)
    scheme = _URL.match(text)
    if scheme is None:
        # A shell leaves the ~ of --out=~/cache alone.
        return LocalRoot(Path(path).expanduser())
    if redact(text) != text:
        # Neither repeated here nor written anywhere: the URL of a store stands in records and reports.
        raise StoreFormatError(
            f"{redact(text)}: the URL holds credentials or a signature; give {scheme[1]}://bucket/prefix "
            "alone, and credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    if scheme[1] not in SCHEMES:
        known = " or ".join(f"{name}://bucket/prefix" for name in SCHEMES)
        raise StoreFormatError(f"{text}: unknown kind of URL; give {known}, or a local path")
    from featurestore.storage.remote import RemoteRoot

    return RemoteRoot(text)


def _spelling(path: str | Path) -> str:
    """pathlib turns s3://bucket into s3:/bucket, which would be a local directory."""
    return re.sub(rf"^({'|'.join(SCHEMES)}):/(?=[^/])", r"\1://", str(path))
