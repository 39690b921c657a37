"""The store at --out: whether there can be one, what is there, and what it lacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from featurestore.errors import StoreAccessError, StoreFormatError, StoreWriteError
from featurestore.format.directory import SPEC_FILE
from featurestore.format.plan import GenerationPlan, plan_generation
from featurestore.format.schema import GroupSpec, TeacherIdentity
from featurestore.storage.files import names_in
from featurestore.storage.root import is_url, root_of
from featurestore.store import FeatureStore
from pipeline.errors import RequestError


def check_store_directory(place: str) -> None:
    """Refuse a store that cannot be created or written, or a place that is in use for something else. Of an
    object store, that it can be listed is all that is known before the first write.

    Raises:
        RequestError: it is a file, holds other files, the nearest existing directory above it is not
            writable, or the object store does not answer.
    """
    if is_url(place):
        try:
            root_of(place).probe()
        except (StoreAccessError, StoreFormatError) as error:
            raise RequestError(f"--out {error}") from error
        return
    out = Path(place).expanduser()
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: exists and is not a directory")
    nearest = next((p for p in (out, *out.absolute().parents) if p.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"--out {out}: {nearest} is not writable")
    # In this order: another command that makes the store meanwhile writes SPEC.json before anything else.
    if names_in(out) and not (out / SPEC_FILE).exists():
        raise RequestError(f"--out {out}: not empty and not a feature store; choose another directory")


def stored_dtype(place: str) -> str | None:
    """The teacher's compute type in the rows that the store at `place` holds; None where it holds none."""
    if not root_of(place).exists(SPEC_FILE):
        return None
    store = FeatureStore.open(place)
    return None if store.is_empty() else store.identity.dtype


def existing_store(place: str, identity: TeacherIdentity) -> FeatureStore | None:
    """The store at `place` when there is one; SpecMismatchError when it is of another teacher.

    An empty one of another teacher counts as none: `create_store` gives it to this one.
    """
    if not root_of(place).exists(SPEC_FILE):
        return None
    store = FeatureStore.open(place)
    if store.identity.differences(identity) and store.is_empty():
        return None
    return FeatureStore.create(place, identity)


def create_store(place: str, identity: TeacherIdentity) -> FeatureStore:
    """The store at `place`, made if there is none.

    Raises:
        RequestError: it cannot be written.
        SpecMismatchError: it is of another teacher, tokenizer or engine.
    """
    try:
        return FeatureStore.create(place, identity)
    except StoreWriteError as error:
        raise RequestError(f"--out {place}: {error}") from error


def plan_missing(
    store: FeatureStore | None,
    wanted: Sequence[tuple[str, int]],
    groups: Sequence[GroupSpec],
    shard_tokens: int,
    first_tokens: int | None = None,
) -> GenerationPlan:
    """What the store, None where there is none yet, lacks of the samples `wanted`, (id, length) each.

    New shards have `shard_tokens` positions at most, the first of them `first_tokens`.
    """
    inventory = store.inventory() if store else None
    known = inventory.holding(sample for sample, _ in wanted) if inventory else {}
    return plan_generation(
        known_tasks=known,
        committed=inventory.committed(known) if inventory else {},
        committed_specs=inventory.specs if inventory else {},
        wanted=wanted,
        groups=groups,
        shard_tokens=shard_tokens,
        first_tokens=first_tokens,
    )
