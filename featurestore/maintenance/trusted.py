"""Which files of a store a manifest vouches for: what a copy of the store has to hold, and no more."""

from __future__ import annotations

from featurestore.bundle import bundle_name
from featurestore.errors import CorruptionError
from featurestore.format.directory import (
    SPEC_FILE,
    manifest_name,
    provenance_names,
    read_manifest,
    read_provenance,
    read_spec,
    read_teacher_listing,
)
from featurestore.format.records import Stamp, commit_name, read_commit
from featurestore.format.tables import read_plan
from featurestore.storage.files import MAX_RECORD_BYTES
from featurestore.storage.protocol import Root


def trusted_files(root: Root, manifest_digest: str) -> list[str]:
    """Names of all files that the manifest names, and of the provenance records; the manifest is the last.

    Every byte is checked, and is at hand under `root.local` afterwards. Other manifests, bundles that no
    record names and what a killed run left are not among them. Raises CorruptionError for the first file
    that is not what was committed.
    """
    manifest = read_manifest(root, manifest_digest)
    if read_spec(root)[1] != manifest.spec:
        raise CorruptionError(f"{root.where(manifest_name(manifest_digest))}: made for another SPEC.json")
    stamps: dict[str, Stamp] = {}
    for listing in manifest.teacher:
        files = read_teacher_listing(root, listing)
        stamps |= {f"teacher/{name}": stamp for name, stamp in files.items()}
    for plan in manifest.plans:
        read_plan(root, plan)
    commits = {(group, task): seal for task, named in manifest.tasks.items() for group, seal in named.items()}
    root.fetch({commit_name(*key): MAX_RECORD_BYTES for key in commits})
    for (group, task), expected in commits.items():
        record = read_commit(root, group, task, expected)
        stamps |= {f"{bundle_name(record)}/{file}": stamp for file, stamp in record.files.items()}
    runs = provenance_names(root)
    for run in runs:
        read_provenance(root, run)
    root.fetch({name: size for name, (size, _) in stamps.items()})
    root.check(stamps)
    return [
        SPEC_FILE,
        *manifest.plans,
        *manifest.teacher,
        *(f"provenance/{run}" for run in runs),
        *stamps,
        *(commit_name(*key) for key in commits),
        manifest_name(manifest_digest),
    ]
