"""From a request and the cache to what training needs: the objective, the column groups to read, the two
sides of the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurestore.errors import MissingFeatureError
from featurestore.reader import CacheReader
from featurestore.schema import GroupSpec, HiddenSpec
from student.data import CachedDataset
from student.errors import UserError
from student.mapping import Pairs, check_pairs, map_layers
from student.objective.requests import ObjectiveRequest, TermRequest
from student.objective.terms import Objective, Term, term
from student.projectors import IDENTITY, ProjectorSpec
from student.split import split_samples


def plan_objective(request: ObjectiveRequest, reader: CacheReader, config: Any) -> Objective:
    """The terms that are asked for; UserError when student and cache cannot give them."""
    terms: list[Term] = []
    for wanted in request.terms:
        if wanted.loss.kind in ("hidden", "structure"):
            terms += _hidden_terms(wanted, reader, config)
        else:
            terms.append(term(wanted.loss.name, wanted.weight, **wanted.options))
    return Objective.of(terms, request.balance)


def _hidden_terms(wanted: TermRequest, reader: CacheReader, config: Any) -> list[Term]:
    """A term for each pair of layers, or with a flow for each two neighbouring pairs; they share the
    weight.
    """
    pairs = _layer_pairs(wanted, reader, config)
    ends: list[tuple[int, int] | None] = [None] * len(pairs)
    if wanted.loss.flow:
        if len(pairs) < 2:
            raise UserError(f"{wanted.where}: {wanted.loss.name} needs at least two pairs of layers, has one")
        ends = list(pairs[1:])
    projector = _projector(wanted, reader.identity.hidden_size, config.get_text_config().hidden_size)
    weight = wanted.weight.scaled(1 / len(ends))
    return [
        term(wanted.loss.name, weight, pair, end, projector, **wanted.options)
        for pair, end in zip(pairs, ends, strict=False)
    ]


def _projector(wanted: TermRequest, teacher_width: int, student_width: int) -> ProjectorSpec | None:
    if wanted.projector != IDENTITY:
        return ProjectorSpec(wanted.projector, student_width, teacher_width)
    if student_width != teacher_width and not wanted.loss.any_width:
        raise UserError(
            f"{wanted.where}: the student is {student_width} wide and the teacher {teacher_width}, so their "
            "hidden states cannot be compared as they are; add --projector linear (in an objective's file "
            "`projector: linear`)"
        )
    return None


def _layer_pairs(wanted: TermRequest, reader: CacheReader, config: Any) -> Pairs:
    """Teacher and student index of every pair, checked against both models' depth."""
    text, identity = config.get_text_config(), reader.identity
    cached = sorted({group.layer for group in reader.groups.values() if isinstance(group, HiddenSpec)})
    if not cached:
        raise UserError(
            f"{wanted.where}: the cache holds no hidden states; add them with "
            "`distily-cache generate ... --hidden-layers 10,20`"
        )
    depths = (identity.num_layers, text.num_hidden_layers)
    if wanted.layer_map is not None:
        check_pairs(wanted.layer_map, *depths, wanted.where)
        return list(wanted.layer_map)
    layers = list(wanted.layers) if wanted.layers is not None else cached
    check_pairs([(layer, 0) for layer in layers], *depths, wanted.where)
    return map_layers(wanted.mapper, layers, *depths, wanted.where)


@dataclass(frozen=True)
class DataPlan:
    """Training samples with the features that the objective needs; held-out samples also with the
    distribution.
    """

    train: CachedDataset
    held_out: CachedDataset | None


def plan_data(objective: Objective, reader: CacheReader, fraction: float) -> DataPlan:
    """MissingFeatureError, with the generate flag that helps, when a column group is not in the cache."""
    groups = [reader.find(kind) for kind in sorted(objective.needs)]
    train, held_out = split_samples(reader.sample_ids, fraction)
    if not held_out:
        return DataPlan(CachedDataset(reader, train, groups), None)
    return DataPlan(
        CachedDataset(reader, train, groups), CachedDataset(reader, held_out, _with_logits(groups, reader))
    )


def _with_logits(groups: list[GroupSpec], reader: CacheReader) -> list[GroupSpec]:
    """Evaluation measures the KL whatever is trained, if the cache can tell it."""
    try:
        logits = reader.find("logits")
    except MissingFeatureError:
        return groups
    return groups if logits in groups else [*groups, logits]
