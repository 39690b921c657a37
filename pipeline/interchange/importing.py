"""`distily-cache import`: a published top-k data set becomes a store. No model is loaded.

The data set is read twice: once to plan (sample ids, lengths, the widest head), once to write shard by shard.
So memory is bounded by a shard, and a killed import resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.format.plan import GenerationPlan
from featurestore.format.schema import GroupFeatures, GroupSpec, LogitsSpec, TeacherIdentity
from featurestore.store import FeatureStore
from pipeline.data.documents import load_table
from pipeline.data.samples import MIN_TOKENS
from pipeline.errors import RequestError
from pipeline.generate import provenance
from pipeline.interchange.layouts.axolotl import Axolotl
from pipeline.interchange.layouts.base import Document, Imported, Layout, to_imported
from pipeline.interchange.layouts.distillkit import CONFIG_FILE, DistillKit
from pipeline.request.target import check_store_directory, create_store, existing_store, plan_missing
from pipeline.teacher.checkpoint import Teacher, load_teacher, teacher_files
from pipeline.teacher.tokenizer import check_kept_files, load_tokenizer

Progress = Callable[[int, int], None]

LAYOUTS = ("distillkit", "axolotl")
TARGETS = ("next", "own")
# Rows fit another position by this much in the mean: no teacher is that much worse at its own next token.
MISFIT = 0.1
MISFIT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """The flags of `distily-cache import`."""

    dataset: str
    out: str
    teacher: str
    layout: str
    split: str = "train"
    dataset_config: str | None = None
    compression: Path | None = None
    targets: str | None = None
    shard_tokens: int = 32_768
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise RequestError(f"--layout {self.layout}: choose one of {', '.join(LAYOUTS)}")
        if self.targets not in (None, *TARGETS):
            raise RequestError(f"--targets {self.targets}: choose one of {', '.join(TARGETS)}")
        if self.targets == "own" and self.layout != "axolotl":
            raise RequestError("--targets own: DistillKit's rows always describe the next token")
        if self.compression is not None and self.layout != "distillkit":
            raise RequestError("--compression: belongs to --layout distillkit")
        if self.shard_tokens < 1:
            raise RequestError(f"--shard-tokens {self.shard_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ImportOutcome:
    """What one import found and wrote.

    samples, tokens: distinct ones of the data set; dropped: texts of one token, and texts in a shard of
    another data set that has no such group. renormalised: positions whose probabilities summed to more than
    one, and now sum to one; unknown: positions without a distribution (the last of a text among them);
    known_labels: next tokens that are in the head. written: tokens committed by this run; size: their bytes.
    """

    samples: int
    tokens: int
    dropped: int
    renormalised: int
    unknown: int
    known_labels: int
    top_k: int
    written: int
    size: int
    manifest: str


@dataclass
class _Survey:
    """The first reading: where each sample is, and sums over all rows."""

    places: dict[str, tuple[int, int]]
    lengths: dict[str, int]
    top_k: int = 1
    short: int = 0
    renormalised: int = 0
    unknown: int = 0
    known_labels: int = 0
    tokens: int = 0


def import_dataset(request: ImportRequest, progress: Progress | None = None) -> ImportOutcome:
    """Bring a published data set into the store at `request.out`.

    Raises RequestError for what the user has to fix (nothing is written then), SpecMismatchError when the
    store is of another teacher or layout.
    """
    check_store_directory(request.out)
    teacher = load_teacher(request.teacher, request.trust_remote_code, with_weights=False)
    tokenizer = load_tokenizer(teacher, request.trust_remote_code)
    check_kept_files(teacher, tokenizer, request.trust_remote_code)
    identity = identity_of_import(request, teacher)
    existing_store(request.out, identity)  # a store of another teacher is refused before the data are read
    rows = _Rows(request, teacher)
    survey = _survey(rows, request)
    began = datetime.now(UTC)
    store = create_store(request.out, identity)
    groups = [LogitsSpec(survey.top_k, partial=True)]
    plan = plan_missing(store, list(survey.lengths.items()), groups, request.shard_tokens)
    store.put_teacher_files(teacher_files(teacher))
    store.add_plan(plan.new_tasks)
    written, size = _write(store, rows, survey, plan, progress)
    outcome = ImportOutcome(
        samples=len(survey.lengths),
        tokens=sum(survey.lengths.values()),
        dropped=survey.short + _foreign(survey, plan),
        renormalised=survey.renormalised,
        unknown=survey.unknown,
        known_labels=survey.known_labels,
        top_k=survey.top_k,
        written=written,
        size=size,
        manifest=store.publish_manifest().digest,
    )
    if written:
        store.add_provenance(provenance.import_record(_plain(request), began, asdict(outcome)))
    return outcome


def identity_of_import(request: ImportRequest, teacher: Teacher) -> TeacherIdentity:
    """Who is said to have computed the rows: the digest is of the config alone, the engine the layout."""
    return teacher.identity(
        engine=f"import:{request.layout}",
        engine_version="unknown",
        dtype=teacher.config_dtype,
        quantization=teacher.quantization,
    )


class _Rows:
    """The data set's rows as imported documents, by place."""

    def __init__(self, request: ImportRequest, teacher: Teacher) -> None:
        table = load_table(request.dataset, request.split, request.dataset_config)
        self._layout = _layout(request, list(table.column_names))
        self._table = table.select_columns(self._layout.columns).with_format("arrow")
        self._vocab_size = teacher.vocab_size
        self._last: tuple[int, list[Imported | None]] = (-1, [])

    def __len__(self) -> int:
        return len(self._table)

    def documents(self, index: int) -> list[Imported | None]:
        """Those of one row of the data set; None for one that is too short to learn from."""
        if self._last[0] != index:
            # A packed row has many, which are asked for one by one.
            found = self._layout.documents(self._table[index : index + 1])
            self._last = index, [self._imported(document, index) for document in found]
        return self._last[1]

    def _imported(self, document: Document, index: int) -> Imported | None:
        if len(document.tokens) < MIN_TOKENS:
            return None
        return to_imported(document, self._vocab_size, f"row {index}")


def _layout(request: ImportRequest, columns: list[str]) -> Layout:
    if request.layout == "axolotl":
        return Axolotl(columns, own=request.targets == "own")
    path = Path(request.dataset).expanduser()
    beside = (path if path.is_dir() else path.parent) / CONFIG_FILE
    return DistillKit(columns, request.compression or (beside if beside.is_file() else None))


def _survey(rows: _Rows, request: ImportRequest) -> _Survey:
    survey = _Survey({}, {})
    fits = np.zeros(3)
    for index in range(len(rows)):
        for number, one in enumerate(rows.documents(index)):
            if one is None:
                survey.short += 1
                continue
            if one.sample.id in survey.places:
                continue
            survey.places[one.sample.id] = (index, number)
            survey.lengths[one.sample.id] = len(one.sample)
            survey.top_k = max(survey.top_k, int(one.features.counts.max()))
            survey.renormalised += one.renormalised
            survey.unknown += one.unknown
            survey.known_labels += int((~np.isnan(one.features.label_logprob)).sum())
            survey.tokens += len(one.sample)
            fits += one.fits
    if not survey.places:
        raise RequestError(f"DATASET {request.dataset}: no text of at least {MIN_TOKENS} tokens in it")
    _check_fits(fits / survey.tokens, survey.tokens, request)
    return survey


def _check_fits(fits: np.ndarray, tokens: int, request: ImportRequest) -> None:
    """RequestError when the distributions are plainly of other tokens, unless the user says otherwise.

    An import that is one position off would train, and be wrong, silently.
    """
    best = int(fits.argmax())
    if request.targets is not None or tokens < MISFIT_TOKENS or fits[best] < fits[1] + MISFIT:
        return
    place, other = ("before", " --targets own, or") if best == 0 else ("behind", "")
    other = other if request.layout == "axolotl" else ""
    raise RequestError(
        f"--targets: the distributions give the next tokens a mean probability of {fits[1]:.2f}, those "
        f"{place} {fits[best]:.2f}, as if they were of these; give{other} --targets next if they are of the "
        "next ones"
    )


def _write(
    store: FeatureStore,
    rows: _Rows,
    survey: _Survey,
    plan: GenerationPlan,
    progress: Progress | None,
) -> tuple[int, int]:
    """Commit each task that this data set has all samples of; returns (tokens, bytes) written."""
    works = [work for work in plan.work if survey.places.keys() >= set(work.task.sample_ids)]
    total = sum(work.task.rows for work in works)
    written = size = 0
    for work in works:
        found = [_at(rows, survey.places[sample_id]) for sample_id in work.task.sample_ids]
        features: dict[GroupSpec, list[GroupFeatures]] = {group: [] for group in work.groups}
        for rows_of_group in features.values():
            rows_of_group += [one.features for one in found]
        records = store.write_bundle(work.task, [one.sample for one in found], features)
        written, size = written + work.task.rows, size + sum(record.size for record in records)
        if progress is not None:
            progress(written, total)
    return written, size


def _at(rows: _Rows, place: tuple[int, int]) -> Imported:
    index, number = place
    one = rows.documents(index)[number]
    assert one is not None  # it was a sample in the first reading
    return one


def _foreign(survey: _Survey, plan: GenerationPlan) -> int:
    """Our samples in tasks of another data set that lack the group: they stay as they are."""
    left = [work.task for work in plan.work if not survey.places.keys() >= set(work.task.sample_ids)]
    return sum(sample_id in survey.places for task in left for sample_id in task.sample_ids)


def _plain(request: ImportRequest) -> dict[str, Any]:
    compression = request.compression and str(request.compression)
    return {**asdict(request), "out": str(request.out), "compression": compression}
