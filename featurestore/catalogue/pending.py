"""Markers: which commit records a manifest may not list yet.

A writer publishes a marker before the first record of a bundle, and whoever publishes a manifest looks at the
records that markers name, so that a new manifest costs what is new. A marker promises nothing: its records
may never come, when its writer was killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from featurestore.errors import CorruptionError, StoreFormatError
from featurestore.format.kinds.table import group_ids
from featurestore.format.plan import Task
from featurestore.identity import BUNDLE_ID, SAMPLES, check_id, header, seal, unseal
from featurestore.storage.protocol import PENDING, Root


@dataclass(frozen=True, kw_only=True)
class Pending:
    """The groups (and "samples") of one task that one bundle sets out to commit."""

    bundle: str
    task: Task
    groups: tuple[str, ...]

    @property
    def name(self) -> str:
        """pending/<bundle>.json."""
        return f"{PENDING}/{self.bundle}.json"

    def to_bytes(self) -> bytes:
        """The content of the marker."""
        return seal(
            {
                **header("pending"),
                "bundle": self.bundle,
                "groups": list(self.groups),
                "samples": list(self.task.sample_ids),
                "lengths": list(self.task.lengths),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, bundle: str, where: str) -> Pending:
        """Parse and validate the marker of a bundle."""
        value = unseal(data, where, "pending")
        if value.get("bundle") != bundle:
            raise CorruptionError(f"{where}: this is the marker of another bundle")
        groups, samples, lengths = (value.get(name) for name in ("groups", "samples", "lengths"))
        if not (isinstance(groups, list) and isinstance(samples, list) and isinstance(lengths, list)):
            raise StoreFormatError(f"{where}: needs groups, samples and lengths")
        task = Task(tuple(samples), tuple(lengths))
        if not bundle.startswith(f"{task.id}-"):
            raise CorruptionError(f"{where}: samples that do not hash to the id of the bundle's task")
        pattern = group_ids()
        named = tuple(group if group == SAMPLES else check_id(group, pattern, where) for group in groups)
        return cls(bundle=bundle, task=task, groups=named)


def pending_bundles(root: Root) -> list[str]:
    """The bundles that have a marker."""
    stems = [name.removesuffix(".json") for name in root.names(PENDING) if name.endswith(".json")]
    return [stem for stem in stems if BUNDLE_ID.fullmatch(stem)]


def read_pending(root: Root, bundles: list[str]) -> list[Pending]:
    """The markers of these bundles; one that has been removed meanwhile is left out."""
    names = {bundle: f"{PENDING}/{bundle}.json" for bundle in bundles}
    root.fetch(dict.fromkeys(names.values(), 2**28))
    found = []
    for bundle, name in names.items():
        try:
            found.append(root.load(name, lambda data, where, b=bundle: Pending.from_bytes(data, b, where)))  # type: ignore[misc]
        except CorruptionError:
            if root.exists(name):
                raise
    return found
