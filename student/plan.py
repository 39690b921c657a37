"""From flags and cache to what training needs: the objective, the column groups to read, the two sides of the
split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurestore.errors import MissingFeatureError
from featurestore.reader import CacheReader
from featurestore.schema import GroupSpec, HiddenSpec
from student.data import CachedDataset
from student.errors import UserError
from student.objective import (
    HeadTerm,
    HiddenTerm,
    Objective,
    check_pairs,
    depth_map,
    parse_layer_map,
    parse_layers,
)
from student.options import StudentOptions
from student.split import split_samples


def plan_objective(options: StudentOptions, reader: CacheReader, config: Any) -> Objective:
    """The terms that the flags ask for; UserError when student and cache cannot give them."""
    head = []
    if "logits" in options.active_losses:
        head.append(HeadTerm(options.logits_loss, options.logits_weight))
    if "ce" in options.active_losses:
        head.append(HeadTerm("ce", options.ce_weight))
    hidden: tuple[HiddenTerm, ...] = ()
    if "hidden" in options.active_losses:
        pairs = _layer_pairs(options, reader, config)
        weight = options.hidden_weight / len(pairs)
        hidden = tuple(HiddenTerm(options.hidden_loss, weight, *pair) for pair in pairs)
    return Objective(tuple(head), hidden)


def _layer_pairs(options: StudentOptions, reader: CacheReader, config: Any) -> list[tuple[int, int]]:
    """Teacher and student index of every hidden term, checked against both models' depth and width."""
    flag = f"--hidden-loss {options.hidden_loss}"
    text, identity = config.get_text_config(), reader.identity
    if text.hidden_size != identity.hidden_size:
        raise UserError(
            f"{flag}: the student is {text.hidden_size} wide and the teacher {identity.hidden_size}, so "
            "their hidden "
            "states cannot be compared; keep the teacher's hidden_size or use --hidden-loss none"
        )
    cached = sorted({group.layer for group in reader.groups.values() if isinstance(group, HiddenSpec)})
    if not cached:
        raise UserError(
            f"{flag}: the cache holds no hidden states; add them with "
            "`distily-cache generate ... --hidden-layers 10,20`"
        )
    depths = (identity.num_layers, text.num_hidden_layers)
    if options.layer_map:
        pairs, flag = parse_layer_map(options.layer_map), "--layer-map"
    else:
        layers = parse_layers(options.hidden_layers) if options.hidden_layers else cached
        check_pairs([(layer, 0) for layer in layers], *depths, "--hidden-layers")
        pairs, flag = depth_map(layers, *depths), "--hidden-layers"
    check_pairs(pairs, *depths, flag)
    return pairs


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
