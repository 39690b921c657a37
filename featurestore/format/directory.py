"""What lies where at the top of a store, and the small sealed files there."""

from __future__ import annotations

import re
from typing import Any

from featurestore.errors import CorruptionError, StoreFormatError, StoreNotFoundError
from featurestore.format.kinds.table import group_ids
from featurestore.format.records import MAX_BYTES, Stamp
from featurestore.format.schema import TeacherIdentity
from featurestore.identity import (
    DIGEST,
    FILE_NAME,
    HASH,
    SAMPLES,
    TASK_ID,
    check_id,
    check_int,
    digest,
    unseal,
)
from featurestore.storage.protocol import Root

SPEC_FILE = "SPEC.json"
PLAN = re.compile(r"plan-[0-9a-f]{32}\.parquet")
MANIFEST = re.compile(r"MANIFEST-([0-9a-f]{32})\.json")
TEACHER = re.compile(r"TEACHER-([0-9a-f]{32})\.json")
PROVENANCE = re.compile(r"([0-9]{20}-[0-9a-f]{8})\.json")


def read_spec(root: Root) -> tuple[TeacherIdentity, str]:
    """The identity in SPEC.json, and the digest of that file; StoreNotFoundError when there is none."""

    def parse(data: bytes, where: str) -> tuple[TeacherIdentity, str]:
        return TeacherIdentity.from_json(unseal(data, where, "spec").get("teacher")), digest(data)

    try:
        return root.load(SPEC_FILE, parse)
    except CorruptionError:
        if root.exists(SPEC_FILE):
            raise
    root.probe()
    raise StoreNotFoundError(f"no store at {root.location}: it has no {SPEC_FILE}")


def plan_names(root: Root) -> list[str]:
    """Names of the plan files."""
    return [name for name in root.names("") if PLAN.fullmatch(name)]


def committed_groups(root: Root) -> list[str]:
    """Groups that have a directory of commit records, "samples" included."""
    pattern = group_ids()
    return [g for g in root.names("commit") if g == SAMPLES or pattern.fullmatch(g)]


def committed_tasks(root: Root, group: str) -> list[str]:
    """Tasks that have a commit record for a group."""
    names = root.names(f"commit/{group}")
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return [stem for stem in stems if TASK_ID.fullmatch(stem)]


def manifest_digests(root: Root) -> list[str]:
    """Digests of the published manifests."""
    return [found[1] for name in root.names("") if (found := MANIFEST.fullmatch(name))]


def manifest_name(manifest_digest: str) -> str:
    """MANIFEST-<digest>.json."""
    return f"MANIFEST-{check_id(manifest_digest, DIGEST, 'manifest')}.json"


def teacher_listings(root: Root) -> list[str]:
    """Names of the TEACHER-<digest>.json files."""
    return [name for name in root.names("") if TEACHER.fullmatch(name)]


def read_teacher_listing(root: Root, listing: str) -> dict[str, Stamp]:
    """File name in teacher/ -> (size, XXH3-64), checked against the listing's own name."""

    def parse(data: bytes, where: str) -> dict[str, Stamp]:
        value = unseal(data, where, "teacher")
        if listing != f"TEACHER-{digest(data)}.json":
            raise CorruptionError(f"{where}: its content does not hash to its name")
        files = value.get("files")
        if not isinstance(files, dict):
            raise StoreFormatError(f"{where}: no list of files")
        stamps: dict[str, Stamp] = {}
        for name, stamp in files.items():
            check_id(name, FILE_NAME, where)
            if not isinstance(stamp, list) or len(stamp) != 2:
                raise StoreFormatError(f"{where}: {name} needs [size, hash]")
            stamps[name] = (check_int(stamp[0], 0, MAX_BYTES, where), check_id(stamp[1], HASH, where))
        return stamps

    return root.load(listing, parse)


def provenance_names(root: Root) -> list[str]:
    """File names of the provenance records, oldest first."""
    return [name for name in root.names("provenance") if PROVENANCE.fullmatch(name)]


def read_provenance(root: Root, name: str) -> dict[str, Any]:
    """One provenance record, as it was given."""

    def parse(data: bytes, where: str) -> dict[str, Any]:
        value = unseal(data, where, "provenance")
        if f"{value.get('id')}.json" != name:
            raise CorruptionError(f"{where}: this is the record {str(value.get('id'))[:40]}")
        record = value.get("record")
        if not isinstance(record, dict):
            raise StoreFormatError(f"{where}: no record")
        return record

    return root.load(f"provenance/{name}", parse)
