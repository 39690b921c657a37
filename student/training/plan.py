"""From a request and the cache to what training needs: the objective, the column groups to read, the two
sides of the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from featurestore.errors import MissingFeatureError
from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.format.sidecar import block_part
from featurestore.reader import CacheReader
from student.data.batches import CachedDataset
from student.data.held_out import Split, split_between, split_cache
from student.data.matched import MatchedDataset
from student.data.measures import Curriculum
from student.data.retokenised import OtherTokens, RetokenisedDataset
from student.data.stores import CacheStores, matched
from student.data.teacher_weights import TeacherParts, load_parts
from student.errors import UserError
from student.losses.blocks import check_student_blocks
from student.losses.catalogue import Need
from student.losses.relation_terms import check_sizes
from student.objective.files import ObjectiveRequest, TermRequest
from student.objective.layer_maps import Pairs, check_pairs, depth_map, map_layers
from student.objective.projectors import IDENTITY, ProjectorSpec
from student.objective.terms import Objective, Term, term
from student.training.teachers import measured, teachers_of, weights_of

CONFIDENCE_SAMPLES = 256


def plan_objective(
    request: ObjectiveRequest, stores: CacheStores, config: Any, training: Sequence[int]
) -> Objective:
    """The terms that are asked for; UserError when student and caches cannot give them.

    training: the samples that are trained on, from which options come that were left to us.
    """
    terms: list[Term] = []
    for requested in request.terms:
        teachers = teachers_of(requested, stores)
        resolved = _with_confidence(requested, stores, teachers, training)
        reader = stores.readers[teachers[0]] if teachers else stores.first
        if Need.LABEL in resolved.loss.needs and "confidence" not in resolved.options:
            for store in teachers:
                _check_labels(resolved, stores.readers[store])
        if resolved.loss.kind == "head":
            made = [term(resolved.loss.name, resolved.weight, **resolved.options)]
        elif Need.FULL not in resolved.loss.needs and resolved.loss.kind in ("hidden", "structure"):
            made = _hidden_terms(resolved, reader, config)
        else:
            find = _final_pair if Need.FULL in resolved.loss.needs else _block_pairs
            pairs = find(resolved, reader, config)
            weight = resolved.weight.scaled(1 / len(pairs))
            made = [term(resolved.loss.name, weight, pair, **resolved.options) for pair in pairs]
        named = f"_teacher{teachers[0]}" if len(stores) > 1 and resolved.teacher is not None else ""
        terms += [replace(one, teachers=teachers, label=one.label + named) for one in made]
    if request.balanced:
        _check_balance(terms)
    if request.teachers is not None and all(len(one.teachers) < 2 for one in terms):
        raise UserError(
            f"{request.where} has no effect: no term learns from the mixture of the teachers; leave it out, "
            "or give terms that name a teacher a schedule of their own"
        )
    objective = Objective.of(terms, request.balanced)
    return replace(objective, teachers=weights_of(request, stores), measured=measured(stores))


def _check_balance(terms: list[Term]) -> None:
    """UserError for a term whose gradient does not reach the student's decoder layers."""
    for one in terms:
        layers = {own for _, own in one.pairs}
        if one.loss.kind in ("hidden", "structure") and layers == {0}:
            raise UserError(
                f"balance: gradient_norm compares gradients in the decoder's layers, which {one.label} does "
                "not reach: it looks at the student's embeddings only; choose other layers for it"
            )


def _check_labels(request: TermRequest, reader: CacheReader) -> None:
    """UserError where the teacher's probability of the next token is not known at every position."""
    group = reader.find("logits")
    if isinstance(group, LogitsSpec) and group.partial:
        raise UserError(
            f"{request.where}: needs the teacher's probability of every next token, which an imported cache "
            "does not have; make one with `distily-cache generate`, or take another loss"
        )


def _with_confidence(
    request: TermRequest, stores: CacheStores, teachers: tuple[int, ...], training: Sequence[int]
) -> TermRequest:
    """A `confidence` that was not given is the teacher's mean probability of the learned tokens, over up to
    CONFIDENCE_SAMPLES of the training samples: those of the smallest ids, which are hashes, so that the
    order of the cache does not matter.
    """
    if request.options.get("confidence", 0.0) is not None:
        return request
    (store,) = teachers  # a loss with confidence is none of a mixture
    reader = stores.readers[store]
    group = reader.find("logits")
    known = []
    for index in stores.first.catalogue.smallest(CONFIDENCE_SAMPLES, training):
        sample = reader.read(stores.index(store, index), [group])
        features = sample.features[group]
        assert isinstance(features, LogitsFeatures)
        learned = features.label_logprob[:-1][sample.loss_mask[1:]]
        known.append(learned[np.isfinite(learned)])
    if not sum(map(len, known)):
        raise UserError(f"{request.where}: no learned token's probability is in the cache; give `confidence`")
    confidence = float(np.exp(np.concatenate(known), dtype=np.float64).mean())
    return replace(request, options={**request.options, "confidence": confidence})


def _hidden_terms(request: TermRequest, reader: CacheReader, config: Any) -> list[Term]:
    """A term for each pair of layers, or with a flow for each two neighbouring pairs; they share the
    weight.
    """
    pairs = _layer_pairs(request, reader, config)
    ends: list[tuple[int, int] | None] = [None] * len(pairs)
    if request.loss.flow:
        if len(pairs) < 2:
            raise UserError(
                f"{request.where}: {request.loss.name} needs at least two pairs of layers, has one"
            )
        ends = list(pairs[1:])
    if request.loss.kind == "structure":
        _check_whole(request, reader, [theirs for theirs, _ in pairs], "--hidden-layers")
    projector = _projector(request, reader.identity.hidden_size, config.get_text_config().hidden_size)
    weight = request.weight.scaled(1 / len(ends))
    return [
        term(request.loss.name, weight, pair, end, projector, **request.options)
        for pair, end in zip(pairs, ends, strict=False)
    ]


def _projector(request: TermRequest, teacher_width: int, student_width: int) -> ProjectorSpec | None:
    if request.projector != IDENTITY:
        return ProjectorSpec(request.projector, student_width, teacher_width)
    if student_width != teacher_width and not request.loss.any_width:
        raise UserError(
            f"{request.where}: the student is {student_width} wide and the teacher {teacher_width}, so their "
            "hidden states cannot be compared as they are; add --projector linear (in an objective's file "
            "`projector: linear`)"
        )
    return None


def _layer_pairs(request: TermRequest, reader: CacheReader, config: Any) -> Pairs:
    """Teacher and student index of every pair, checked against both models' depth."""
    text, identity = config.get_text_config(), reader.identity
    cached = _hidden_layers(reader)
    if not cached:
        raise UserError(
            f"{request.where}: the cache holds no hidden states; add them with "
            "`distily-cache generate ... --hidden-layers 10,20`"
        )
    depths = (identity.num_layers, text.num_hidden_layers)
    if request.layer_map is not None:
        check_pairs(request.layer_map, *depths, request.where)
        return list(request.layer_map)
    layers = list(request.layers) if request.layers is not None else cached
    check_pairs([(layer, 0) for layer in layers], *depths, request.where)
    return map_layers(request.mapper, layers, *depths, request.where)


def _check_width(request: TermRequest, reader: CacheReader, config: Any) -> None:
    own, theirs = config.get_text_config().hidden_size, reader.identity.hidden_size
    if own != theirs:
        raise UserError(
            f"{request.where}: the student is {own} wide and the teacher {theirs}, so their hidden states "
            "cannot be compared; keep the teacher's hidden_size or leave the loss out"
        )


def _final_pair(request: TermRequest, reader: CacheReader, config: Any) -> list[tuple[int, int]]:
    """The last hidden states of both models; UserError unless the cache has the teacher's, and its head."""
    depth = reader.identity.num_layers
    if request.loss.kind == "hidden":
        _check_width(request, reader, config)
    if "head" not in reader.sidecar().parts or depth not in _hidden_layers(reader):
        raise UserError(
            f"{request.where}: the cache cannot give the full distribution; add it with "
            "`distily-cache generate ... --final`"
        )
    _check_whole(request, reader, [depth], "--final")
    return [(depth, config.get_text_config().num_hidden_layers)]


def _block_pairs(request: TermRequest, reader: CacheReader, config: Any) -> list[tuple[int, int]]:
    """Blocks of teacher and student, numbered by what goes into them; UserError where the cache lacks one, or
    the student has none like it.
    """
    depths = (reader.identity.num_layers, config.get_text_config().num_hidden_layers)
    parts = reader.sidecar().parts
    cached = [layer for layer in _hidden_layers(reader) if block_part(layer) in parts]
    if request.layer_map is not None:
        pairs = list(request.layer_map)
    else:
        layers = list(request.layers) if request.layers is not None else cached
        pairs = [(t, min(s, depths[1] - 1)) for t, s in depth_map(layers, *depths)]
    for theirs, own in pairs:
        if not (0 <= theirs < depths[0] and 0 <= own < depths[1]):
            raise UserError(
                f"{request.where}: no pair of blocks {theirs}:{own}; the teacher's are 0 to {depths[0] - 1}, "
                f"the student's 0 to {depths[1] - 1}"
            )
    absent = [theirs for theirs, _ in pairs if theirs not in cached]
    if absent or not pairs:
        layer = absent[0] if absent else depths[0] - 1
        raise UserError(
            f"{request.where}: the cache lacks projections and input of the teacher's block {layer}; add "
            f"them with `distily-cache generate ... --relation-layers {layer}`"
        )
    _check_whole(request, reader, [theirs for theirs, _ in pairs], "--relation-layers")
    check_student_blocks(config, request.where)
    for theirs, _ in pairs:
        spec = reader.sidecar().block(theirs).spec
        check_sizes(request.loss, request.options, config.get_text_config(), spec, request.where)
    return pairs


def _check_whole(request: TermRequest, reader: CacheReader, layers: Sequence[int], flag: str) -> None:
    """UserError where the cache has one of the layers at a share of the positions only."""
    for layer in layers:
        group = reader.find(f"hidden.L{layer}")
        if isinstance(group, HiddenSpec) and not group.whole:
            value = "" if flag == "--final" else f" {layer}"
            raise UserError(
                f"{request.where}: needs layer {layer} at all positions, and the cache has it at "
                f"{group.positions:.3g} of them; store all with `distily-cache generate ... {flag}{value}` "
                "without --hidden-positions, or take a loss of single positions, e.g. hidden_mse"
            )


def _hidden_layers(reader: CacheReader) -> list[int]:
    return sorted({group.layer for group in reader.groups.values() if isinstance(group, HiddenSpec)})


@dataclass(frozen=True)
class DataPlan:
    """Training samples with the features that the objective needs; held-out samples also with the
    distribution.
    """

    train: CachedDataset
    held_out: CachedDataset | None
    split: Split


def load_teacher(objective: Objective, reader: CacheReader, store: int = 0) -> TeacherParts:
    """What the objective needs of the own weights of a cache's teacher; store: the number of the cache."""
    blocks = sorted({theirs for theirs, _ in objective.relations(store)})
    return load_parts(reader, objective.needs_head(store), blocks)


def plan_split(
    reader: CacheReader,
    fraction: float,
    samples: int | None = None,
    evaluated: CacheReader | None = None,
    stores: CacheStores | None = None,
) -> Split:
    """The samples that are trained on, and those that are held out.

    samples: how many are trained on, the first ones; None for all. UserError where there are not as many.
    evaluated: the cache of the held-out samples; None for a fraction of the one that is trained on. stores:
    where it is one of several, only samples that all have are on a side.
    """
    split = split_cache(reader, fraction) if evaluated is None else split_between(reader, evaluated)
    split = split if stores is None else matched(split, stores)
    if samples is not None and samples > len(split.training):
        raise UserError(
            f"--train-samples {samples}: the cache has {len(split.training)} that are not held out"
        )
    return split if samples is None else replace(split, training=split.training[:samples])


def plan_data(
    objective: Objective,
    reader: CacheReader,
    split: Split,
    learned: LogitsSpec | None = None,
    evaluated: CacheReader | None = None,
    curriculum: Curriculum | None = None,
    other: OtherTokens | None = None,
) -> DataPlan:
    """MissingFeatureError, with the generate flag that helps, when a column group is not in the cache.

    evaluated: the cache of the held-out samples; None for the one that is trained on.

    learned: the part of the cache's distribution that is trained on, None for the widest. Held-out samples
    have the widest in any case, so that students that learned from less are measured by the same numbers; for
    the same reason curriculum, which of the positions are trained on, is none of theirs. other: how samples
    become those of a student with another tokenizer.
    """
    groups = [reader.find(kind) for kind in sorted(objective.needs())]
    trained = [learned if learned and isinstance(group, LogitsSpec) else group for group in groups]
    train, held_out = split.training, split.held_out
    dataset = partial(CachedDataset) if other is None else partial(RetokenisedDataset, other=other)
    learning = dataset(reader, train, trained, curriculum=curriculum)
    if not held_out:
        return DataPlan(learning, None, split)
    source = reader
    if evaluated is not None:
        source, groups = evaluated, [evaluated.find(kind) for kind in sorted(objective.needs())]
    measured = dataset(source, held_out, _with_logits(groups, source))
    return DataPlan(learning, measured, split)


def plan_matched(
    objective: Objective,
    stores: CacheStores,
    split: Split,
    learned: Sequence[LogitsSpec | None],
    curriculum: Curriculum | None = None,
) -> DataPlan:
    """As `plan_data`, of several caches; learned: for each."""
    trained, held_out = [], []
    for store, (reader, spec) in enumerate(zip(stores.readers, learned, strict=True)):
        groups = [reader.find(kind) for kind in sorted(objective.needs(store))]
        trained.append([spec if spec and isinstance(group, LogitsSpec) else group for group in groups])
        held_out.append(_with_logits(groups, reader) if store in objective.measured else groups)
    evaluated = MatchedDataset(stores, split.held_out, held_out) if split.held_out else None
    return DataPlan(MatchedDataset(stores, split.training, trained, curriculum), evaluated, split)


def plan_distribution(
    objective: Objective,
    reader: CacheReader,
    top_k: int | None,
    top_p: float | None,
    tail: int | None,
    store: int = 0,
) -> LogitsSpec | None:
    """What --top-k, --top-p and --tail leave of a cache's distribution; None where none is given, or the
    objective reads that of other caches only. store: the number of the cache.

    UserError when nothing that is learned reads it, MissingFeatureError where the cache does not cover it.
    """
    given = {"--top-k": top_k, "--top-p": top_p, "--tail": tail}
    flags = [name for name, value in given.items() if value is not None]
    if not flags:
        return None
    if not any("logits" in objective.needs(number) for number in range(len(objective.teachers))):
        raise UserError(
            f"{flags[0]} has no effect: no loss of this objective reads the stored distribution; leave it out"
        )
    return reader.find_logits(top_k, top_p, tail) if "logits" in objective.needs(store) else None


def _with_logits(groups: list[GroupSpec], reader: CacheReader) -> list[GroupSpec]:
    """Evaluation measures the KL whatever is trained, if the cache can tell it."""
    try:
        logits = reader.find("logits")
    except MissingFeatureError:
        return groups
    return groups if logits in groups else [*groups, logits]
