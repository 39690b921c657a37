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
from student.objective.layers import check_pairs, depth_map
from student.objective.requests import ObjectiveRequest, TermRequest
from student.objective.terms import Objective, Term, term
from student.split import split_samples


def plan_objective(request: ObjectiveRequest, reader: CacheReader, config: Any) -> Objective:
    """The terms that are asked for; UserError when student and cache cannot give them."""
    terms: list[Term] = []
    for wanted in request.terms:
        if wanted.loss.kind != "hidden":
            terms.append(term(wanted.loss.name, wanted.weight, **wanted.options))
            continue
        pairs = _layer_pairs(wanted, reader, config)
        weight = wanted.weight.scaled(1 / len(pairs))
        terms += [term(wanted.loss.name, weight, pair, **wanted.options) for pair in pairs]
    return Objective.of(terms, request.balance)


def _layer_pairs(wanted: TermRequest, reader: CacheReader, config: Any) -> list[tuple[int, int]]:
    """Teacher and student index of every hidden term, checked against both models' depth and width."""
    text, identity = config.get_text_config(), reader.identity
    if text.hidden_size != identity.hidden_size:
        raise UserError(
            f"{wanted.where}: the student is {text.hidden_size} wide and the teacher {identity.hidden_size}, "
            "so their hidden states cannot be compared; keep the teacher's hidden_size or leave the loss out"
        )
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
    return depth_map(layers, *depths)


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
