"""The Hugging Face hub, as both command lines meet it: who is asking, and errors in one line.

The client is imported on use: a store that stays at home does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distily.errors import DistilyError, HubError
from distily.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Whatever the hub's client raises in the body becomes a HubError of one line.

    Its HTTP library has changed before, and with it what it raises; so nothing is told apart here.
    """
    try:
        yield
    except DistilyError:
        raise
    except Exception as error:
        raise HubError(f"{what}: {one_line(error, 300)}") from error


def client() -> HfApi:
    """The hub's client, with the login that `hf auth login` or HF_TOKEN left; nothing is asked yet."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise HubError("the hub needs huggingface_hub; pip install huggingface_hub") from error
    return HfApi(library_name="distily-cache")


def logged_in(repo: str) -> HfApi:
    """A client that the hub knows by name; HubError before anything is sent to `repo`."""
    api = client()
    with asking(f"REPO {repo}: the hub does not let us in; log in with `hf auth login` or set HF_TOKEN"):
        api.whoami()
    return api
