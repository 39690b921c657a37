"""The table of all kinds of column groups, and what is decided by it.

A further kind is a spec and features in `featurestore.format.schema`, a module with its object beside this
one, and an entry here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from featurestore.errors import StoreFormatError
from featurestore.format.codes import LogitsCodes
from featurestore.format.columns import Extent, Stats, shard_key
from featurestore.format.kinds.base import Array, GroupKind
from featurestore.format.kinds.hidden import HiddenKind
from featurestore.format.kinds.logits import LogitsKind
from featurestore.format.kinds.lse import LseKind
from featurestore.format.schema import (
    GroupFeatures,
    GroupSpec,
    HiddenFeatures,
    LseFeatures,
    TeacherIdentity,
)

GroupCodes = LogitsCodes | LseFeatures | HiddenFeatures

KINDS: dict[type, GroupKind[Any, Any, Any]] = {
    kind.spec: kind for kind in (LogitsKind(), HiddenKind(), LseKind())
}


def kind_of(spec: GroupSpec) -> GroupKind[GroupSpec, GroupFeatures, GroupCodes]:
    """What knows how groups of this spec are stored, read and shown."""
    return KINDS[type(spec)]


def group_spec_from_json(value: object) -> GroupSpec:
    """The inverse of `to_json`; StoreFormatError for anything that `to_json` cannot have written."""
    fields = dict(value) if isinstance(value, dict) else {}
    name = fields.pop("kind", None)
    kind: GroupKind[GroupSpec, Any, Any] | None = next((k for k in KINDS.values() if k.name == name), None)
    if kind is None:
        raise StoreFormatError(f"unknown kind of column group: {str(name)[:80]!r}")
    try:
        return kind.spec(**fields)
    except TypeError:
        raise StoreFormatError(f"column group {name}: unknown or missing fields {sorted(fields)}") from None


def group_ids() -> re.Pattern[str]:
    """What the id of a column group looks like."""
    return re.compile(rf"({'|'.join(kind.ids for kind in KINDS.values())})-[0-9a-f]{{8}}")


def group_files(spec: GroupSpec) -> list[str]:
    """Every file of a group, relative to its directory: metadata, and one shard per array."""
    extent = Extent(rows=1, samples=1, entries=1, distinct_ids=1, vocab_size=1, hidden_size=1)
    files = ["zarr.json"]
    for name, layout in kind_of(spec).layouts(spec, extent).items():
        files += [f"{name}/zarr.json", f"{name}/{shard_key(layout)}"]
    return files


def covers(have: GroupSpec, want: GroupSpec) -> bool:
    """Whether a cache of `have` serves a request for `want`."""
    return type(have) is type(want) and kind_of(have).covers(have, want)


def parts(have: Iterable[GroupSpec], want: GroupSpec) -> list[GroupSpec]:
    """The parts of `want`, each of which one of `have` covers, that are all of it; none where there are no
    such parts.
    """
    return kind_of(want).parts([one for one in have if type(one) is type(want)], want)


def rest(have: Iterable[GroupSpec], want: GroupSpec) -> GroupSpec | None:
    """The group that serves `want` together with groups of `have`; None where these do."""
    return kind_of(want).rest([one for one in have if type(one) is type(want)], want)


def ways(have: Iterable[GroupSpec], want: GroupSpec) -> list[list[GroupSpec]]:
    """Ways to cut `want` into parts, see `GroupKind.ways`."""
    return kind_of(want).ways([one for one in have if type(one) is type(want)], want)


def width(spec: GroupSpec) -> tuple[float, ...]:
    """Orders the specs that have the same `kind` by how much they tell."""
    return kind_of(spec).width(spec)


def flag_of(kind: str) -> str:
    """The flag of `distily-cache generate` that adds a column group called `kind`: "hidden.L20"."""
    flags = (one.flag(kind) for one in KINDS.values())
    return next((flag for flag in flags if flag), "that adds it")


def pack(
    spec: GroupSpec, features: Sequence[GroupFeatures], lengths: Sequence[int], identity: TeacherIdentity
) -> tuple[dict[str, Array], Stats]:
    """Check the features of a task's samples, in order, and join them into the arrays of the group.

    ValueError, naming the sample, for anything that the documented shapes, dtypes and ranges exclude.
    """
    kind = kind_of(spec)
    kind.check_teacher(spec, identity)
    if len(features) != len(lengths):
        raise ValueError(f"{spec.kind}: features of {len(features)} samples for {len(lengths)} samples")
    for i, (one, length) in enumerate(zip(features, lengths, strict=True)):
        try:
            kind.check(spec, one, length, identity)
        except ValueError as error:
            raise ValueError(f"{spec.kind}, sample {i} of the task: {error}") from None
    return kind.pack(spec, features, identity)
