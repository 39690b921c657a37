"""The audit: does every byte that was committed lie where it should, unchanged?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from featurestore.bundle import Group, bundle_name, check_extent, read_samples
from featurestore.catalogue.files import SegmentFiles
from featurestore.catalogue.inventory import take_stock
from featurestore.catalogue.manifest import (
    Manifest,
    SegmentRef,
    check_head,
    head_names,
    read_head,
    read_manifest,
)
from featurestore.catalogue.pending import pending_bundles, read_pending
from featurestore.catalogue.segment import Segment
from featurestore.errors import FeatureStoreError, StoreAccessError, StoreNotFoundError
from featurestore.format.directory import (
    SPEC_FILE,
    committed_groups,
    committed_tasks,
    manifest_digests,
    manifest_name,
    plan_names,
    provenance_names,
    read_provenance,
    read_spec,
    read_teacher_listing,
    teacher_listings,
)
from featurestore.format.plan import Task
from featurestore.format.records import CommitRecord, FlatManifest, Stamp, commit_name, read_commit_and_digest
from featurestore.format.schema import TeacherIdentity
from featurestore.format.sidecar import checked_part, part_of
from featurestore.format.tables import read_plan
from featurestore.format.written import piece_names, read_piece
from featurestore.identity import SAMPLES, digest
from featurestore.parallel import in_order
from featurestore.storage.files import MAX_RECORD_BYTES
from featurestore.storage.protocol import HEADS, PENDING, Root
from featurestore.storage.root import root_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file. path: relative to the store."""

    path: str
    what: str


@dataclass
class Report:
    """The result of an audit. rows: positions whose samples are committed."""

    problems: list[Problem] = field(default_factory=list)
    checked_files: int = 0
    checked_bytes: int = 0
    rows: int = 0

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def verify_store(path: str | Path, deep: bool, progress: Progress | None = None) -> Report:
    """Check every file that the store's records name.

    Args:
        path: a local directory, s3://bucket/prefix or gs://bucket/prefix.
        deep: also hash their bytes and decode all rows. Without it presence and sizes of data files are
            checked, and all records, plans and manifests.
        progress: called as `progress(done, total)` for each commit record.

    Returns:
        What was looked at and every problem found; `report.sound` is True without any.

    Raises:
        StoreNotFoundError: there is no store.
        StoreAccessError: the object store does not answer.

    Example:
        assert verify("run/cache", deep=True).sound
    """
    root = root_of(path)
    if not root.exists(SPEC_FILE) and not root.names("commit"):
        raise StoreNotFoundError(f"no store at {root.location}")
    with root.audit() as audited:
        return _Audit(audited, deep).run(progress)


class _Checks:
    """Counts the files that are looked at and keeps what is wrong; no check stops the next."""

    def __init__(self, root: Root, deep: bool) -> None:
        self.root = root
        self.deep = deep
        self.report = Report()

    @contextmanager
    def _file(self, name: str) -> Iterator[None]:
        """Count a file of the store, and report what its check raises."""
        self.report.checked_files += 1
        self.report.checked_bytes += self.root.size(name)
        with self._guard(name):
            yield

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except StoreAccessError:
            # A service that does not answer says nothing about the store.
            raise
        except (FeatureStoreError, OSError) as error:
            self._problem(name, str(error))

    def _problem(self, name: str, what: str) -> None:
        what = what.replace(f"{self.root.where(name)}: ", "").replace(f"{self.root.location}/", "")
        if Problem(name, what) not in self.report.problems:
            self.report.problems.append(Problem(name, what))


class _TaskAudit(_Checks):
    """The commit records of one task, and the files that they name. `task` is None where no plan has it."""

    def __init__(
        self, root: Root, deep: bool, task_id: str, task: Task | None, identity: TeacherIdentity | None
    ) -> None:
        super().__init__(root, deep)
        self.task_id = task_id
        self.task = task
        self.identity = identity
        self.records: dict[tuple[str, str], tuple[str, str]] = {}

    def run(self, groups: Sequence[str]) -> _TaskAudit:
        for group in groups:
            self._commit(group)
        return self

    def _commit(self, group: str) -> None:
        name, task_id, task = commit_name(group, self.task_id), self.task_id, self.task
        with self._file(name):
            record, seal = read_commit_and_digest(self.root, group, task_id)
            self.records[group, task_id] = seal, _said(record)
            if task is None:
                self._problem(name, "no readable plan file and no segment has this task")
            else:
                check_extent(record, task)
                self._data(record, task)

    def _data(self, record: CommitRecord, task: Task) -> None:
        before = len(self.report.problems)
        stamps = {f"{bundle_name(record)}/{file}": stamp for file, stamp in record.files.items()}
        if self.deep:
            self.root.fetch({name: size for name, (size, _) in stamps.items()})
        for name, stamp in stamps.items():
            with self._file(name):
                self.root.check({name: stamp}, self.deep)
        if record.group == SAMPLES:
            self.report.rows += record.rows
        if self.deep and len(self.report.problems) == before and self.identity is not None:
            with self._guard(f"{bundle_name(record)}/{record.group}"), self.root.naming():
                self._decode(record, task, self.identity)
        self.root.release(bundle_name(record))

    def _decode(self, record: CommitRecord, task: Task, identity: TeacherIdentity) -> None:
        """Read every row the way a reader does."""
        if record.group == SAMPLES:
            read_samples(self.root, record, task)
            return
        columns = Group(self.root, record, task, identity)
        for position in range(len(task.lengths)):
            columns.read(position)


class _Audit(_Checks):
    """One pass over a store."""

    def __init__(self, root: Root, deep: bool) -> None:
        super().__init__(root, deep)
        self.identity: TeacherIdentity | None = None
        self.tasks: dict[str, Task] = {}
        self.planned: dict[str, dict[str, Task]] = {}
        self.records: dict[tuple[str, str], tuple[str, str]] = {}
        self.segments: dict[str, SegmentRef] = {}

    def run(self, progress: Progress | None) -> Report:
        spec_digest = self._spec()
        for name in plan_names(self.root):
            with self._file(name):
                self.planned[name] = {task.id: task for task in read_plan(self.root, name)}
                self.tasks.update(self.planned[name])
        self._side_files()
        manifests = self._manifests()
        groups: dict[str, list[str]] = {}
        for group in committed_groups(self.root):
            for task in committed_tasks(self.root, group):
                groups.setdefault(task, []).append(group)
        self._commits(groups, progress)
        if groups and not manifests:
            self._problem("MANIFEST", "no manifest lists what is committed; run the same generate again")
        for name, manifest in manifests.items():
            self._manifest(name, manifest, spec_digest)
        self._unlisted(manifests)
        return self.report

    def _commits(self, groups: Mapping[str, Sequence[str]], progress: Progress | None) -> None:
        """Look at the records of each task; of several at a time."""
        names = [commit_name(group, task) for task, of_task in groups.items() for group in of_task]
        self.root.fetch(dict.fromkeys(names, MAX_RECORD_BYTES))
        done = 0
        for part in in_order(self._task, groups.items()):
            self._add(part.report)
            self.records.update(part.records)
            done += len(groups[part.task_id])
            if progress is not None:
                progress(done, len(names))

    def _task(self, item: tuple[str, Sequence[str]]) -> _TaskAudit:
        task, groups = item
        return _TaskAudit(self.root, self.deep, task, self.tasks.get(task), self.identity).run(groups)

    def _add(self, part: Report) -> None:
        self.report.problems += [one for one in part.problems if one not in self.report.problems]
        self.report.checked_files += part.checked_files
        self.report.checked_bytes += part.checked_bytes
        self.report.rows += part.rows

    def _spec(self) -> str | None:
        with self._file(SPEC_FILE):
            self.identity, spec_digest = read_spec(self.root)
            return spec_digest
        return None

    def _side_files(self) -> None:
        for name in provenance_names(self.root):
            with self._file(f"provenance/{name}"):
                read_provenance(self.root, name)
        for name in piece_names(self.root):
            with self._file(name):
                read_piece(self.root, name)
        for listing in teacher_listings(self.root):
            with self._file(listing):
                for name, stamp in read_teacher_listing(self.root, listing).items():
                    with self._file(f"teacher/{name}"):
                        self._teacher_file(name, stamp)

    def _teacher_file(self, name: str, stamp: Stamp) -> None:
        if self.deep and self.identity is not None and part_of(name):
            with self.root.naming():
                checked_part(self.root, name, stamp, self.identity)
        else:
            self.root.check({f"teacher/{name}": stamp}, self.deep)

    def _manifests(self) -> dict[str, Manifest | FlatManifest]:
        """The manifests by file name, and the tasks that their segments hold."""
        found: dict[str, Manifest | FlatManifest] = {}
        for manifest_digest in manifest_digests(self.root):
            name = manifest_name(manifest_digest)
            with self._file(name):
                found[name] = read_manifest(self.root, manifest_digest)
        for name in head_names(self.root):
            with self._file(f"{HEADS}/{name}"):
                read_head(self.root, name)
                self.root.load(f"{HEADS}/{name}", partial(check_head, name))
        newest = max((m.head for m in found.values() if isinstance(m, Manifest)), default=None)
        if newest is not None and newest not in head_names(self.root):
            self._problem(f"{HEADS}/{newest}", "missing; run the same generate again")
        for bundle in pending_bundles(self.root):
            with self._file(f"{PENDING}/{bundle}.json"):
                self.tasks.update(
                    (marker.task.id, marker.task) for marker in read_pending(self.root, [bundle])
                )
        for manifest in found.values():
            for ref, segment in self._segments(manifest):
                tasks = (segment.task(row) for row in range(segment.tasks))
                with self._guard(ref.name):
                    self.tasks.update((task.id, task) for task in tasks)
        return found

    def _segments(self, manifest: Manifest | FlatManifest) -> Iterator[tuple[SegmentRef, Segment]]:
        """Those of the segments of a manifest that no manifest before has named, read whole."""
        refs = manifest.segments if isinstance(manifest, Manifest) else ()
        new = [ref for ref in refs if self.segments.setdefault(ref.digest, ref) is ref]
        files = SegmentFiles(self.root, new, manifest.groups)
        for number, ref in enumerate(new):
            with self._file(ref.name):
                yield ref, files.checked(number)

    def _manifest(self, name: str, manifest: Manifest | FlatManifest, spec_digest: str | None) -> None:
        if spec_digest is not None and manifest.spec != spec_digest:
            self._problem(name, "made for another SPEC.json")
        plans = manifest.plans if isinstance(manifest, FlatManifest) else ()
        for file in (*plans, *manifest.teacher):
            if not self.root.exists(file):
                self._problem(file, "the file is missing")
        if isinstance(manifest, Manifest):
            self._listed(manifest)
            return
        planned = {task for plan in manifest.plans for task in self.planned.get(plan, ())}
        for task, groups in manifest.tasks.items():
            if task not in planned:
                self._problem(name, f"task {task} is in none of the plan files that it names")
            for group, expected in groups.items():
                if self.records.get((group, task), ("",))[0] != expected:
                    what = "not the commit record that the manifest names, or missing"
                    self._problem(f"commit/{group}/{task}.json", what)

    def _listed(self, manifest: Manifest) -> None:
        """What the segments of a manifest say of commit records is what these say."""
        files = SegmentFiles(self.root, manifest.segments, manifest.groups)
        for number, ref in enumerate(manifest.segments):
            if self.segments.pop(ref.digest, None) is None:
                continue
            with self._guard(ref.name):
                segment = files.checked(number)
                for row in range(segment.tasks):
                    digests = segment.record_digests(row)
                    for group, record in segment.records(row, manifest.groups).items():
                        self._listed_record(ref.name, record, digests[group])

    def _listed_record(self, name: str, record: CommitRecord, expected: str) -> None:
        found, said = self.records.get((record.group, record.task), ("", ""))
        if found != expected:
            what = "not the commit record that the manifest names, or missing"
            self._problem(commit_name(record.group, record.task), what)
        elif said != _said(record):
            self._problem(name, f"says something else of task {record.task} than its commit record")

    def _unlisted(self, manifests: Mapping[str, Manifest | FlatManifest]) -> None:
        """Records that neither the newest manifest nor a marker names, where there are markers."""
        if not any(isinstance(manifest, Manifest) for manifest in manifests.values()):
            return
        with self._guard(HEADS):
            inventory = take_stock(self.root, {})
            listed = inventory.committed(task for _, task in self.records)
            for group, task in self.records:
                if task not in listed.get(group, ()):
                    what = "no manifest and no marker names it; `distily-cache gc --delete` lists it"
                    self._problem(commit_name(group, task), what)


def _said(record: CommitRecord) -> str:
    """All that a segment repeats of a commit record."""
    # A segment has numbers of one type.
    stats = sorted((name, float(number)) for name, number in record.stats.items())
    said = (record.bundle, record.rows, record.samples, sorted(record.files.items()), stats, record.documents)
    return digest(repr(said).encode())
