"""The Hugging Face hub, as both command lines meet it: who is asking, and errors in one line.

The client is imported on use: a store that stays at home does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from featurestore.errors import FeatureStoreError, StoreAccessError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Whatever the hub's client raises in the body becomes a StoreAccessError of one line.

    Its HTTP library has changed before, and with it what it raises; so nothing is told apart here.
    """
    try:
        yield
    except FeatureStoreError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StoreAccessError(f"{what}: {reason}") from error


def client() -> HfApi:
    """The hub's client, with the login that `hf auth login` or HF_TOKEN left; nothing is asked yet."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise StoreAccessError("the hub needs huggingface_hub; pip install huggingface_hub") from error
    return HfApi(library_name="distily-cache")


def logged_in(repo: str) -> HfApi:
    """A client that the hub knows by name; StoreAccessError before anything is sent to `repo`."""
    api = client()
    with asking(f"REPO {repo}: the hub does not let us in; log in with `hf auth login` or set HF_TOKEN"):
        api.whoami()
    return api
