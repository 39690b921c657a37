"""Objects below one URL of a bucket, through obstore: its calls, and its errors in our words."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from distily.text import one_line
from featurestore.errors import CorruptionError, StoreAccessError, StoreFormatError

TRUE = ("1", "true", "yes", "on")
RETRIES: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
CREATE_ATTEMPTS = 3
# Seconds before another try of what obstore itself does not try again.
WAITS = (0.1, 0.5, 2.0)
TORN, UNSENT = "response body", "error sending request"
HINTS = {
    "ExpiredToken": "the credentials have expired; renew them and run the command again",
    "RequestTimeTooSkewed": "the clock of this machine differs from the service's; set it",
    "NoSuchBucket": "there is no such bucket",
    # The services that give a machine of the cloud its credentials, asked when there are no others.
    "latest/api/token": "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "computeMetadata": "no credentials found; set GOOGLE_APPLICATION_CREDENTIALS",
    "403 Forbidden": "access denied; check the credentials, what they allow, and the clock of this machine",
    "401 Unauthorized": "access denied; check the credentials",
    "builder error": "the endpoint is plain http; set AWS_ALLOW_HTTP=true if that is meant",
    UNSENT: "no answer from the object store; check the network and AWS_ENDPOINT_URL",
    TORN: "replies were cut short again and again; check the network",
    "non-2xx status code": "refused without a reason; check the credentials, and whether they have expired",
    "Unable to recognise URL": "not the URL of a bucket; give s3://bucket/prefix or gs://bucket/prefix",
}

# What the reply to a HEAD request leaves to guesses, since it has no body.
UNREASONED = (HINTS["non-2xx status code"], HINTS["403 Forbidden"])
T = TypeVar("T")

# The process whose obstore runs its threads. They do not survive a fork, and a call in the child would hang.
_runtime_owner: int | None = None


def forked() -> bool:
    """Was this process forked from one that had used obstore."""
    return _runtime_owner not in (None, os.getpid())


class Objects:
    """The objects below a URL, by their names relative to it.

    Raises CorruptionError for an object that is missing where it has to be, StoreAccessError for all else.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._obstore = _import(url)
        self._client: Any = None
        if not forked():
            with self._errors():
                self._client = self._obstore.store.from_url(
                    url, retry_config=RETRIES, client_options=_client_options()
                )

    def head(self, name: str) -> Any | None:
        """Metadata (size, last_modified, e_tag) of an object, None when there is none."""
        try:
            with self._errors(name):
                return self._obstore.head(self._here(), name)
        except CorruptionError:
            return None
        except StoreAccessError as error:
            if str(error).endswith(UNREASONED):
                self.within(name)  # the reply to this has a body, which says why
            raise

    def equals(self, name: str, data: bytes) -> bool | None:
        """Whether an object has these bytes, None when there is no such object."""
        try:
            with self._errors(name):
                reply = self._obstore.get(self._here(), name)
                return reply.meta["size"] == len(data) and bytes(reply.bytes()) == data
        except CorruptionError:
            return None

    def blocks(self, name: str, limit: int) -> Iterator[bytes]:
        """The bytes of an object in order; CorruptionError when it has more than `limit`."""
        with self._errors(name):
            reply = self._obstore.get(self._here(), name)
            if reply.meta["size"] > limit:
                raise CorruptionError(f"{self.url}/{name}: {reply.meta['size']} bytes, more than {limit}")
            yield from reply.stream()

    def below(self, folder: str) -> list[Any]:
        """Metadata of every object below a folder."""
        with self._errors():
            return list(self._again(TORN, lambda: self._obstore.list(self._here(), folder or None).collect()))

    def within(self, folder: str) -> list[str]:
        """Last parts of the names of the objects and folders right in a folder."""
        with self._errors():
            listing = self._again(
                TORN, lambda: self._obstore.list_with_delimiter(self._here(), folder or None)
            )
        paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
        return sorted(name for path in paths if (name := path.rsplit("/", 1)[-1]))

    def put(self, name: str, content: Path | bytes) -> None:
        """Upload a file or bytes, whatever is there."""
        with self._errors(name):
            self._obstore.put(self._here(), name, content)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object unless there is one; did this call, or an earlier try of it, make it.

        A store's records hold a random name or are named by their digest, so an object with equal bytes is
        ours: its reply was lost.
        """
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                with self._errors(name):
                    self._obstore.put(self._here(), name, data, mode="create")
                return True
            except (FileExistsError, StoreAccessError):
                ours = self.equals(name, data)
                if ours is not None:
                    return ours
                # Nothing is there: a conflict with a writer that failed in its turn.
                if attempt == CREATE_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def delete(self, names: list[str]) -> None:
        """Remove objects; those that are gone already are no error."""
        with self._errors():
            self._again(UNSENT, lambda: self._obstore.delete(self._here(), names))

    def _again(self, sign: str, call: Callable[[], T]) -> T:
        """`call()`, tried again while its error has this sign: obstore gives up a listing whose reply was cut
        short, and a removal that did not get through, though both may be repeated.
        """
        for wait in WAITS:
            try:
                return call()
            except self._obstore.exceptions.BaseError as error:
                if sign not in str(error):
                    raise
            time.sleep(wait)
        return call()

    def _here(self) -> Any:
        """The client, in a process that may use it."""
        global _runtime_owner  # noqa: PLW0603  (obstore has one runtime per process)
        if self._client is None or forked():
            raise StoreAccessError(
                f"{self.url}: a process that was forked after the object store was used can only read "
                "through an open reader; start processes with spawn or forkserver"
            )
        _runtime_owner = os.getpid()
        return self._client

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """obstore's exceptions as ours, in one line each."""
        known = self._obstore.exceptions
        try:
            yield
        except known.AlreadyExistsError as error:
            raise FileExistsError(f"{self.url}/{name}: exists") from error
        except (known.BaseError, FileNotFoundError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
                raise CorruptionError(f"{self.url}/{name}: the file is missing") from None
            raise StoreAccessError(f"{self.url}: {_reason(text)}") from None


def _import(url: str) -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise StoreFormatError(
            f"{url}: object stores need the package obstore; install the extra [s3]"
        ) from None
    return obstore


def _client_options() -> Any:
    # Given options replace those that obstore takes from the environment, so this one is passed on.
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in TRUE
    # The default limit of 30 s is for a whole request, too short for a large object on a slow line.
    return {"allow_http": allow_http, "connect_timeout": "5s", "read_timeout": "60s", "timeout": "1h"}


def _reason(text: str) -> str:
    """What the user has to know of obstore's account of a failed request."""
    for sign, hint in HINTS.items():
        if sign in text:
            return hint
    said = re.search(r"<Message>(.*?)</Message>", text, flags=re.S)
    return one_line(said[1] if said else text.partition("\n\nDebug source")[0], None)
