"""A store on the hub: pushed as a data set, file by file; pulled, and verified before it counts."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distily.hub import asking, client, logged_in
from distily.safety.redaction import for_record
from featurestore.catalogue.manifest import fullest_manifest
from featurestore.errors import CorruptionError
from featurestore.format.directory import SPEC_FILE, read_provenance
from featurestore.maintenance.info import store_info
from featurestore.maintenance.trusted import trusted_files
from featurestore.maintenance.verify import verify_store
from featurestore.storage.files import sync
from featurestore.storage.protocol import Root
from featurestore.storage.root import is_url, root_of
from pipeline.errors import RequestError
from pipeline.interchange.hub_card import store_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
# What of a repository can belong to a store; its card, and whatever else somebody put there, does not.
STORE_FILES = [
    SPEC_FILE,
    "plan-*.parquet",
    "MANIFEST-*.json",
    "TEACHER-*.json",
    *(f"{folder}/*" for folder in ("commit", "heads", "parts", "provenance", "segments", "teacher")),
]
# What says what there is: of an older push none may stay, and the last commit brings the new ones.
_LAST = ("MANIFEST-", "heads/")
_LISTS = (*_LAST, "segments/")
_COMMIT_FILES = 500
_HOSTILE = re.compile(r"[\x00-\x1f\\:]")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What was pushed or pulled. revision: the commit on the hub. bytes: of the store's files."""

    url: str
    revision: str
    manifest: str
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def push_store(store: str | Path, repo: str, private: bool = False) -> Shared:
    """Upload what the current manifest of a store vouches for, and a card, to the data set `repo`.

    Every byte is checked before it is sent. The manifest goes last: a repository of which a push was killed
    has none, or still its old one, and the same push completes it.

    Raises:
        HubError: the hub refuses us, before anything is sent, or fails.
        RequestError: nothing is committed yet, or `repo` holds the store of another teacher.
        CorruptionError: a file of the store is damaged.
    """
    api = logged_in(repo)
    info = store_info(store)
    root = root_of(store)
    if info.manifest is None:
        raise RequestError(f"STORE {store}: nothing is committed yet; let `generate` finish once")
    names = trusted_files(root, info.manifest)
    paths = {name: root.local(name) for name in names}
    _check_records(root, names)
    sent = sum(path.stat().st_size for path in paths.values())
    with asking(f"REPO {repo}"):
        url = api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        repo = url.repo_id
        remote = _remote(api, repo, None)
    _check_same_store(repo, remote, paths[SPEC_FILE].read_bytes())
    card = store_card(info, repo, sent).encode()
    stale = [path for path in remote if path.startswith(_LISTS) and path not in paths]
    with asking(f"REPO {repo}: the push failed; the same command completes it"):
        revision = _send(api, repo, paths, card, stale)
    return Shared(url=str(url), revision=revision, manifest=info.manifest, files=len(names), bytes=sent)


def pull_store(repo: str, path: str | Path, revision: str | None = None) -> Shared:
    """Download the store in the data set `repo` into the new directory `path`.

    It comes into a hidden directory beside `path`, is verified there to the last byte, and only then gets its
    name. A pull that was killed resumes there. Raises RequestError when `path` is in use or `repo` lists what
    no store has, CorruptionError when a file is not what was committed, HubError when the hub fails.
    """
    if is_url(path):
        raise RequestError(f"STORE {path}: a pull goes into a new local directory")
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"STORE {path} is there already; choose a new directory")
    api = client()
    with asking(f"REPO {repo}"):
        commit = str(api.dataset_info(repo, revision=revision).sha)
        remote = _remote(api, repo, commit)
    names = _of_the_store(repo, remote)
    private = path.absolute().with_name(f".{path.name}.pull-{commit[:12]}")
    _check_room(repo, sum(remote[name].size for name in names), path, private)
    private.mkdir(parents=True, exist_ok=True)
    with asking(f"REPO {repo}: the pull failed; the same command resumes"):
        api.snapshot_download(
            repo, repo_type="dataset", revision=commit, local_dir=private, allow_patterns=STORE_FILES
        )
    manifest = _verified(private, repo)
    shutil.rmtree(private / ".cache", ignore_errors=True)
    if path.is_dir():
        path.rmdir()
    private.rename(path)
    sync(path.absolute().parent)
    url = f"{api.endpoint}/datasets/{repo}"
    return Shared(
        url=url,
        revision=commit,
        manifest=manifest,
        files=len(names),
        bytes=sum(remote[name].size for name in names),
    )


def safe(path: str) -> bool:
    """Can a file of this name only come to lie below the directory that it is written to."""
    return not _HOSTILE.search(path) and not {"", ".", ".."} & set(path.split("/"))


def _remote(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _of_the_store(repo: str, remote: Iterable[str]) -> list[str]:
    """Those that belong to a store; RequestError for any that would lie elsewhere, or when there is none."""
    if hostile := [path for path in remote if not safe(path)]:
        raise RequestError(f"REPO {repo} lists {hostile[0]!r}, which no store has; nothing was downloaded")
    names = [path for path in remote if any(fnmatchcase(path, pattern) for pattern in STORE_FILES)]
    if SPEC_FILE not in names or not any(name.startswith("MANIFEST-") for name in names):
        raise RequestError(f"REPO {repo} holds no store, or one whose push is not complete")
    return names


def _check_room(repo: str, size: int, path: Path, private: Path) -> None:
    """RequestError where the files have no room on the disk, beside what is downloaded already."""
    parent = next(folder for folder in private.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if size > free + sum(file.stat().st_size for file in private.rglob("*") if file.is_file()):
        raise RequestError(
            f"STORE {path}: {repo} has {size:,} bytes of a store and {parent} has {free:,} free; choose a "
            "directory on a larger disk"
        )


def _check_records(root: Root, names: Iterable[str]) -> None:
    """RequestError for the record of a run, of an older version or another program, that holds a secret."""
    for name in names:
        if not name.startswith("provenance/"):
            continue
        record = read_provenance(root, name.partition("/")[2])
        if for_record(record) != record:
            raise RequestError(
                f"STORE {root.location}: {name} holds a credential or the address of a private service in "
                "its command line; delete this file, which nothing else needs, or replace what it names"
            )


def _check_same_store(repo: str, remote: Mapping[str, RepoFile], spec: bytes) -> None:
    there = remote.get(SPEC_FILE)
    # The name that git has for these bytes.
    ours = hashlib.sha1(b"blob %d\0" % len(spec) + spec, usedforsecurity=False).hexdigest()
    if there is not None and there.blob_id != ours:
        raise RequestError(f"REPO {repo} holds another store; choose another name")


def _send(api: HfApi, repo: str, paths: Mapping[str, Path], card: bytes, stale: Sequence[str]) -> str:
    """Commit after commit; the last one has the manifest and the card, and takes old manifests away."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, path) for name, path in paths.items()]
    data = [add for add in adds if not add.path_in_repo.startswith(_LAST)]
    last = [add for add in adds if add.path_in_repo.startswith(_LAST)]
    for start in range(0, len(data), _COMMIT_FILES):
        _commit(api, repo, data[start : start + _COMMIT_FILES], "Files of the store")
    old = [CommitOperationDelete(path) for path in stale]
    return _commit(api, repo, [*last, CommitOperationAdd(CARD, card), *old], "Manifest and card")


def _commit(
    api: HfApi, repo: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str
) -> str:
    done = api.create_commit(repo, operations, commit_message=message, repo_type="dataset")
    return done.oid


def _verified(directory: Path, repo: str) -> str:
    """Digest of the manifest of a sound store; one that is not is removed."""
    problems = verify_store(directory, deep=True).problems
    manifest = None if problems else fullest_manifest(root_of(directory))
    if manifest is None:
        shutil.rmtree(directory)
        what = f"{problems[0].path}: {problems[0].what}" if problems else "it has no manifest"
        raise CorruptionError(f"REPO {repo} holds a damaged store, and it was not kept: {what}")
    return manifest
