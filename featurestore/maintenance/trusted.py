"""Which files of a store a manifest vouches for: what a copy of the store has to hold, and no more."""

from __future__ import annotations

from featurestore.bundle import bundle_name
from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.manifest import Manifest, read_head, read_manifest
from featurestore.errors import CorruptionError
from featurestore.format.directory import (
    SPEC_FILE,
    manifest_name,
    provenance_names,
    read_provenance,
    read_spec,
    read_teacher_listing,
)
from featurestore.format.records import FlatManifest, Stamp, commit_name, read_commit
from featurestore.format.tables import read_plan
from featurestore.storage.files import MAX_RECORD_BYTES
from featurestore.storage.protocol import HEADS, Root


def trusted_files(root: Root, manifest_digest: str) -> list[str]:
    """Names of all files that the manifest names, and of the provenance records; the manifest is the last,
    behind its head if it has one.

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
    lists, commits = (
        _flat(root, manifest) if isinstance(manifest, FlatManifest) else _segments(root, manifest)
    )
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
        *manifest.teacher,
        *(f"provenance/{run}" for run in runs),
        *stamps,
        *(commit_name(*key) for key in commits),
        *lists,
        manifest_name(manifest_digest),
    ]


_Commits = dict[tuple[str, str], str]


def _flat(root: Root, manifest: FlatManifest) -> tuple[list[str], _Commits]:
    """What lists the samples, and the commit records."""
    for plan in manifest.plans:
        read_plan(root, plan)
    commits = {(group, task): seal for task, named in manifest.tasks.items() for group, seal in named.items()}
    return list(manifest.plans), commits


def _segments(root: Root, manifest: Manifest) -> tuple[list[str], _Commits]:
    files = SegmentFiles(root, manifest.segments, manifest.groups)
    commits: _Commits = {}
    for number in range(len(files)):
        segment = files.checked(number)
        for row in range(segment.tasks):
            task = segment.task(row).id
            commits |= {(group, task): seal for group, seal in segment.record_digests(row).items()}
    head = f"{HEADS}/{manifest.head}"
    read_head(root, manifest.head)
    root.fetch({head: MAX_RECORD_BYTES})
    return [*(ref.name for ref in manifest.segments), head], commits
