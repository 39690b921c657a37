"""What lies where at the top of a store, and the small sealed files there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featurestore.errors import CorruptionError, StoreFormatError, StoreNotFoundError
from featurestore.files import names_in, read_bounded
from featurestore.identity import (
    DIGEST,
    FILE_NAME,
    GROUP_ID,
    HASH,
    SAMPLES,
    TASK_ID,
    check_id,
    check_int,
    digest,
    unseal,
)
from featurestore.records import MAX_BYTES, Manifest, Stamp
from featurestore.schema import TeacherIdentity

SPEC_FILE = "SPEC.json"
PLAN = re.compile(r"plan-[0-9a-f]{32}\.parquet")
MANIFEST = re.compile(r"MANIFEST-([0-9a-f]{32})\.json")
TEACHER = re.compile(r"TEACHER-([0-9a-f]{32})\.json")
PROVENANCE = re.compile(r"([0-9]{20}-[0-9a-f]{8})\.json")


def read_spec(root: Path) -> tuple[TeacherIdentity, str]:
    """The identity in SPEC.json, and the digest of that file; StoreNotFoundError when there is none."""
    path = root / SPEC_FILE
    if not path.exists():
        raise StoreNotFoundError(f"no store at {root}: it has no {SPEC_FILE}")
    data = read_bounded(path)
    value = unseal(data, str(path), "spec")
    return TeacherIdentity.from_json(value.get("teacher")), digest(data)


def plan_names(root: Path) -> list[str]:
    """Names of the plan files."""
    return [name for name in names_in(root) if PLAN.fullmatch(name)]


def committed_groups(root: Path) -> list[str]:
    """Groups that have a directory of commit records, "samples" included."""
    return [g for g in names_in(root / "commit") if g == SAMPLES or GROUP_ID.fullmatch(g)]


def committed_tasks(root: Path, group: str) -> list[str]:
    """Tasks that have a commit record for a group."""
    names = names_in(root / "commit" / group)
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return [stem for stem in stems if TASK_ID.fullmatch(stem)]


def manifest_digests(root: Path) -> list[str]:
    """Digests of the published manifests."""
    return [found[1] for name in names_in(root) if (found := MANIFEST.fullmatch(name))]


def manifest_path(root: Path, manifest_digest: str) -> Path:
    """MANIFEST-<digest>.json."""
    return root / f"MANIFEST-{check_id(manifest_digest, DIGEST, 'manifest')}.json"


def read_manifest(root: Path, manifest_digest: str) -> Manifest:
    """A manifest, checked against its name."""
    path = manifest_path(root, manifest_digest)
    data = read_bounded(path)
    manifest = Manifest.from_bytes(data, str(path))
    if digest(data) != manifest_digest:
        raise CorruptionError(f"{path}: its content does not hash to its name")
    return manifest


def fullest_manifest(root: Path) -> str | None:
    """Digest of the manifest with the most commit records, the newest one of a store that only grows."""
    digests = manifest_digests(root)
    return max(digests, key=lambda d: (read_manifest(root, d).records, d), default=None)


def teacher_listings(root: Path) -> list[str]:
    """Names of the TEACHER-<digest>.json files."""
    return [name for name in names_in(root) if TEACHER.fullmatch(name)]


def read_teacher_listing(path: Path) -> dict[str, Stamp]:
    """File name in teacher/ -> (size, XXH3-64), checked against the listing's own name."""
    data = read_bounded(path)
    value = unseal(data, str(path), "teacher")
    if path.name != f"TEACHER-{digest(data)}.json":
        raise CorruptionError(f"{path}: its content does not hash to its name")
    files = value.get("files")
    if not isinstance(files, dict):
        raise StoreFormatError(f"{path}: no list of files")
    stamps: dict[str, Stamp] = {}
    for name, stamp in files.items():
        check_id(name, FILE_NAME, str(path))
        if not isinstance(stamp, list) or len(stamp) != 2:
            raise StoreFormatError(f"{path}: {name} needs [size, hash]")
        stamps[name] = (check_int(stamp[0], 0, MAX_BYTES, str(path)), check_id(stamp[1], HASH, str(path)))
    return stamps


def provenance_names(root: Path) -> list[str]:
    """File names of the provenance records, oldest first."""
    return [name for name in names_in(root / "provenance") if PROVENANCE.fullmatch(name)]


def read_provenance(root: Path, name: str) -> dict[str, Any]:
    """One provenance record, as it was given."""
    path = root / "provenance" / name
    value = unseal(read_bounded(path), str(path), "provenance")
    if value.get("id") != path.stem:
        raise CorruptionError(f"{path}: this is the record {str(value.get('id'))[:40]}")
    record = value.get("record")
    if not isinstance(record, dict):
        raise StoreFormatError(f"{path}: no record")
    return record
