"""Which samples of which cache a student is measured on: checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distily.checkpoint.configs import json_object
from featurestore.catalogue.views import Without
from featurestore.errors import StoreNotFoundError
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from student.data.held_out import split_cache
from student.data.retokenised import OtherTokens
from student.data.stores import CacheStores, matched, open_stores
from student.data.token_statistics import with_choices
from student.errors import UserError
from student.evaluation.cache import CachePlan
from student.evaluation.request import EvalRequest
from student.modeling.other_tokenizer import OwnTokenizer, other_tokens
from student.modeling.plan import load_config, same_tokenizer
from student.modeling.saving import saved_config, student_config
from student.modeling.shape import check_positions, check_vocabulary
from student.objective.other_tokenizer import WHY
from student.training.resume import manifests_to_read
from student.training.teachers import mixes


def plan_cache(request: EvalRequest) -> CachePlan:
    """UserError where the cache is gone, is of another tokenizer, or has no samples for this."""
    summary = _summary(request.directory)
    stores = _open(request, summary)
    other = _other_tokens(request.directory, stores)
    logits = tuple(map(_logits, stores.readers))
    if len(stores) > 1:
        _check_mixed(request.directory, stores, logits)
    indices = _indices(request, summary, stores)
    if other is not None:
        # As in training: by what is not measured here, if there is anything else.
        others = Without(len(stores.first), sorted(indices)) if len(indices) < len(stores.first) else indices
        other = with_choices(stores.first, others, other)
    final = None if len(stores) > 1 or other else _final(stores.first)
    return CachePlan(stores, indices[: request.limit], logits, final, other)


def plan_trained(request: EvalRequest, held_out: CachePlan) -> CachePlan:
    """The same with the samples that the training learned from. UserError where that is not known: no
    summary.json says how many they were, or they were of another cache or state of it.
    """
    summary, stores = _summary(request.directory), held_out.stores
    learned, fraction = summary.get("train_samples"), summary.get("eval_fraction")
    if not isinstance(learned, int) or fraction is None:
        raise UserError(
            f"--trained-samples: {request.directory} has no summary.json that says which they were; leave "
            "the flag out"
        )
    if request.cache.fraction not in (None, fraction) or stores.manifests[0] != summary.get("manifest"):
        raise UserError(
            "--trained-samples: the training read another cache, another state of it or another "
            "--eval-fraction; leave --cache, --manifest and --eval-fraction out"
        )
    training = matched(split_cache(stores.first, fraction), stores).training[:learned]
    return replace(held_out, indices=training[: request.limit])


def _logits(reader: CacheReader) -> LogitsSpec:
    logits = reader.find("logits")
    assert isinstance(logits, LogitsSpec)
    return logits


def _check_mixed(directory: Path, stores: CacheStores, logits: Sequence[LogitsSpec]) -> None:
    """UserError where the caches of a training do not give the mixture of their teachers."""
    for reader, name, spec in zip(stores.readers, stores.names, logits, strict=True):
        if not mixes(reader, spec):
            raise UserError(
                f"{directory} was trained from several caches, of which {name} holds no draws, so their "
                "mixture is not known; measure against one of them with --cache"
            )


def _summary(directory: Path) -> dict[str, Any]:
    """summary.json of a training's output; empty where there is none."""
    return json_object(directory / "summary.json")


def _open(request: EvalRequest, summary: dict[str, Any]) -> CacheStores:
    """The cache that is asked for, else those of the training."""
    if request.cache.store is not None:
        reader = CacheReader.open(request.cache.store, request.cache.manifest)
        return CacheStores(readers=(reader,))
    if "cache" not in summary:
        raise UserError(
            f"{request.directory} has no summary.json that names a cache; give one with --cache, or evaluate "
            "on --text or --tasks"
        )
    several = summary.get("stores") or [summary | {"weight": None}]
    paths, digests = ([str(one[key]) for one in several] for key in ("cache", "manifest"))
    weights = [one["weight"] for one in several] if len(several) > 1 else None
    given = request.cache.manifest
    try:
        return open_stores(paths, manifests_to_read(given, None, len(paths)) if given else digests, weights)
    except StoreNotFoundError as error:
        raise UserError(
            f"the cache of {request.directory} is gone ({' and '.join(paths)}); say with --cache where it "
            "is, or evaluate on --text or --tasks"
        ) from error


def _other_tokens(directory: Path, stores: CacheStores) -> OtherTokens | None:
    """How samples become those of a student with another tokenizer; UserError where it does not fit."""
    reader = stores.first
    config = student_config(saved_config(str(directory)))
    teacher = load_config(str(reader.teacher_dir), "the cache's teacher/")
    same = same_tokenizer(directory, reader.teacher_dir)
    if same is False:
        if len(stores) > 1:
            raise UserError(
                f"{directory}: {WHY}, so it is measured against one cache; choose one with --cache"
            )
        OwnTokenizer(directory, str(directory)).check(config, str(directory))
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        return other_tokens(reader, directory, longest)
    check_vocabulary(config, teacher, reader.identity.vocab_size, str(directory), bool(same))
    check_positions(config, int(reader.lengths.max()), str(directory))
    return None


def _indices(request: EvalRequest, summary: dict[str, Any], stores: CacheStores) -> Sequence[int]:
    if request.cache.all_samples:
        return Without(len(stores.first), stores.missing())
    fraction = request.cache.fraction
    if fraction is None:
        fraction = summary.get("eval_fraction")
    if not fraction:
        why = "did not hold out samples" if fraction == 0 else "does not say which samples it held out"
        raise UserError(
            f"the training of {request.directory} {why}; name their share with --eval-fraction, or take "
            "--all-samples"
        )
    return matched(split_cache(stores.first, fraction), stores).held_out


def _final(reader: CacheReader) -> GroupSpec | None:
    """The teacher's final states, where the cache has them at all positions, and its LM head."""
    kind = f"hidden.L{reader.identity.num_layers}"
    if "head" not in reader.sidecar().parts or all(g.kind != kind for g in reader.complete_groups()):
        return None
    group = reader.find(kind)
    return group if isinstance(group, HiddenSpec) and group.whole else None
