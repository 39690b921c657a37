"""Every run's flags are checked against the cache before the first run starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from featurestore.errors import BAD_REQUESTS
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.config.parser import parse
from student.data.retokenised import RetokenisedDataset
from student.errors import UserError
from student.sweep.home import Home, read_json
from student.sweep.runs import SweepRun, corners, expand
from student.sweep.spec import SweepSpec
from student.training.outputs import OVERWRITE, holds_training
from student.training.run import prepare


def arguments(
    run: SweepRun, stores: Sequence[str], manifest: str, directory: Path, resume: bool = False
) -> list[str]:
    """The words of a run after `distily-train from-cache`. Without a checkpoint to resume it begins anew."""
    words = [*stores, "--output-dir", str(directory), *run.words()]
    words += [] if "manifest" in run.flags else ["--manifest", manifest]
    if resume:
        return [*words, "--resume-from-checkpoint", "True"]
    return [*words, OVERWRITE] if holds_training(directory) else words


def manifest_of(home: Home, stores: Sequence[str]) -> str:
    """What all runs read: what those before them read, however the caches have grown since; several with
    commas between.
    """
    before = read_json(home.table)
    if before is None:
        return ",".join(CacheReader.open(store).manifest_digest for store in stores)
    digests = before["manifest"].split(",")
    other = (
        f"--out {home.path} has a sweep over {before['store']} at manifest {before['manifest']}, which "
        f"{' and '.join(stores)} does not have; choose another --out"
    )
    if len(digests) != len(stores):
        raise UserError(other)
    try:
        readers = [CacheReader.open(store, digest) for store, digest in zip(stores, digests, strict=True)]
    except BAD_REQUESTS as error:
        raise UserError(other) from error
    return ",".join(reader.manifest_digest for reader in readers)


def plan(spec: SweepSpec, stores: Sequence[str], manifest: str, home: Home) -> list[SweepRun]:
    """The runs of a grid, or none yet of a search. UserError for a flag of any run that cannot be served; of
    a search each choice is tried by itself.
    """
    runs = expand(spec) if spec.search is None else []
    _check(runs or corners(spec), spec, stores, manifest, home)
    return runs


def _check(
    runs: Iterable[SweepRun], spec: SweepSpec, stores: Sequence[str], manifest: str, home: Home
) -> None:
    for run in runs:
        try:
            request = parse(arguments(run, stores, manifest, home.directory(run)))
            held_out = prepare(request).data.held_out
        except (UserError, *BAD_REQUESTS) as error:
            raise UserError(f"run {run.name}: {error}") from error
        groups = held_out.groups if held_out else ()
        known = any(isinstance(group, LogitsSpec) for group in groups)
        if spec.metric == "eval_bits_per_byte":
            known = isinstance(held_out, RetokenisedDataset)
        needed = ("eval_kl", "eval_top1_agreement", "eval_bits_per_byte")
        if held_out is None or (spec.metric in needed and not known):
            fix = "take metric: eval_ce" if held_out else "give an --eval-fraction above 0"
            raise UserError(f"run {run.name}: there will be no {spec.metric} to compare by; {fix}")
