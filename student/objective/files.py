"""What is asked for, from flags or from a file, before the cache has been looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from student.errors import UserError
from student.losses.catalogue import Loss, Need, find_loss, suggest
from student.objective.layer_maps import MAPPERS, check_mapper
from student.objective.weights import Weight
from student.yamlfile import read_yaml

_TERM_KEYS = ("loss", "weight", "teacher", "layers", "layer_map", "mapper", "projector")
_SCHEDULE_KEYS = ("schedule", "from", "to", "until")
_SCHEDULES = ("constant", "linear", "cosine")
_BALANCES = ("none", "gradient_norm")


@dataclass(frozen=True, kw_only=True)
class TermRequest:
    """One term that is asked for. layers, layer_map, mapper, projector: as in the flags --hidden-layers,
    --layer-map, --mapper and --projector; where: how error lines name the term. teacher: number or name of
    the cache that it learns from; None for the mixture of all, and between layers for the first one.
    """

    loss: Loss
    weight: Weight
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    layer_map: tuple[tuple[int, int], ...] | None = None
    mapper: str = "all"
    projector: str = "identity"
    teacher: int | str | None = None


@dataclass(frozen=True)
class ObjectiveRequest:
    """All terms that are asked for; balanced: with weights that are ratios of gradient norms. teachers: the
    weights of several caches' teachers in their mixture, of which one moves at least; None where the file
    does not say. where: how error lines name them.
    """

    terms: tuple[TermRequest, ...]
    balanced: bool = False
    teachers: tuple[Weight, ...] | None = None
    where: str = ""


def read_objective(given: str) -> ObjectiveRequest:
    """The request of an objective file (YAML), or of the objective itself where `given` is a JSON object;
    UserError, naming file and key, for whatever is wrong in it.
    """
    if given.lstrip().startswith("{"):
        return parse_objective(_inline(given), "--objective")
    where = f"--objective {given}"
    return parse_objective(read_yaml(given, where, "a YAML file of terms"), where)


def _inline(text: str) -> Any:
    """JSON, in which layers as keys are strings."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: {_key(key): value for key, value in pairs})
    except (ValueError, RecursionError) as error:
        raise UserError(f"--objective is not valid JSON ({error}); give a YAML file of terms") from error


def _key(key: str) -> str | int:
    return int(key) if key.isascii() and key.isdigit() else key


def parse_objective(value: object, where: str) -> ObjectiveRequest:
    """The request that a parsed file makes."""
    example = "write e.g. `terms: [{loss: kl, weight: 1.0}]`"
    if not isinstance(value, dict):
        raise UserError(f"{where}: needs a mapping with a list `terms`; {example}")
    _check_keys(value, ("terms", "balance", "teachers"), where)
    terms = value.get("terms")
    if not isinstance(terms, list) or not terms:
        raise UserError(f"{where}: `terms` must be a list of at least one term; {example}")
    parsed = tuple(_term(term, f"{where}: terms[{index}]") for index, term in enumerate(terms))
    balance = value.get("balance", "none")
    if balance not in _BALANCES:
        raise UserError(f"{where}: balance must be one of {', '.join(_BALANCES)}, not {balance!r}")
    if balance != "none" and len(parsed) < 2:
        raise UserError(f"{where}: balance: {balance} needs at least two terms")
    if not any(term.weight.start or term.weight.end for term in parsed):
        raise UserError(f"{where}: nothing to learn: give a term a weight above 0")
    teachers = _teachers(value["teachers"], f"{where}: teachers") if "teachers" in value else None
    return ObjectiveRequest(parsed, balance != "none", teachers, f"{where}: teachers")


def _teachers(value: object, where: str) -> tuple[Weight, ...]:
    """Weights in the order of the STOREs."""
    example = "[{schedule: linear, from: 1.0, to: 0.5}, 0.5]"
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where} must be a list of a weight for each of several STOREs, e.g. {example}")
    weights = tuple(parse_weight(one, f"{where}[{number}]") for number, one in enumerate(value))
    if all(weight.schedule == "constant" for weight in weights):
        raise UserError(
            f"{where}: none of these weights moves; give a schedule, e.g. {example}, or constant weights "
            "with --teacher-weights"
        )
    for number, weight in enumerate(weights):
        if not max(weight.start, weight.end):
            raise UserError(f"{where}[{number}] is zero throughout; leave that STORE out")
    for place, progress in (("start", 0.0), ("end", 1.0)):
        if not any(weight.at(progress) for weight in weights):
            raise UserError(f"{where}: all weights are zero at the {place} of the training; raise one there")
    return weights


def _term(value: object, where: str) -> TermRequest:
    if not isinstance(value, dict) or "loss" not in value:
        raise UserError(f"{where} must be a mapping with a key `loss`, e.g. {{loss: kl, weight: 1.0}}")
    loss = find_loss(value["loss"], where)
    where = f"{where} ({loss.name})"
    options = {key: given for key, given in value.items() if key not in _TERM_KEYS}
    final = Need.FULL in loss.needs
    layered = loss.kind in ("hidden", "structure", "relation") and not final
    known = _TERM_KEYS[: (5 if loss.kind == "relation" else 7) if layered else 3]
    for key in options:
        _check_keys({key: None}, (*known, *loss.options), where)
    if misplaced := [key for key in _TERM_KEYS if key in value and key not in known]:
        raise UserError(f"{where}: {', '.join(misplaced)}: no key of this loss; leave it out")
    if "layer_map" in value and ("layers" in value or "mapper" in value):
        raise UserError(f"{where}: layer_map excludes layers and mapper; keep one")
    from student.objective.projectors import IDENTITY, PROJECTORS

    projector = value.get("projector", IDENTITY)
    if projector not in PROJECTORS:
        raise UserError(f"{where}: projector must be one of {', '.join(PROJECTORS)}, not {projector!r}")
    return TermRequest(
        loss=loss,
        weight=parse_weight(value.get("weight", 1.0), f"{where}: weight"),
        where=where,
        options=loss.check_options(options, where),
        layers=_layers(value["layers"], where) if "layers" in value else None,
        layer_map=_layer_map(value["layer_map"], where) if "layer_map" in value else None,
        mapper=_mapper(value["mapper"], where) if "mapper" in value else "all",
        projector=projector,
        teacher=_teacher(value["teacher"], loss, where) if "teacher" in value else None,
    )


def _teacher(value: object, loss: Loss, where: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(
            f"{where}: teacher must be the number of a STORE, 0 for the first, or its name, not {value!r}"
        )
    if not loss.needs:
        raise UserError(f"{where}: teacher: this loss learns from the labels alone; leave the key out")
    return value


def parse_weight(value: object, where: str) -> Weight:
    """A number, or `{schedule: linear | cosine | constant, from: A, to: B, until: F}`."""
    if not isinstance(value, dict):
        return Weight.constant(_number(value, where))
    _check_keys(value, _SCHEDULE_KEYS, where)
    schedule = value.get("schedule")
    if schedule not in _SCHEDULES:
        raise UserError(f"{where}: schedule must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")
    if "from" not in value:
        raise UserError(f"{where}: a schedule needs `from`, and `to` unless it is constant")
    start = _number(value["from"], f"{where}: from")
    if schedule == "constant":
        if "to" in value or "until" in value:
            raise UserError(f"{where}: a constant schedule has no `to` and no `until`; use linear or cosine")
        return Weight.constant(start)
    if "to" not in value:
        raise UserError(f"{where}: a {schedule} schedule needs `to`")
    end, until = _number(value["to"], f"{where}: to"), _number(value.get("until", 1.0), f"{where}: until")
    if not 0 < until <= 1:
        raise UserError(f"{where}: until is a fraction of the training, above 0 and at most 1, not {until:g}")
    if not max(start, end):
        raise UserError(f"{where} is zero throughout; leave it out")
    return Weight(start, end, schedule, until)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        hint = " (YAML reads 1e-3 as a word; write 1.0e-3)" if _is_exponent(value) else ""
        raise UserError(f"{where} must be a finite number of at least 0, not {value!r}{hint}")
    return float(value)


def _is_exponent(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _layers(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(layer) is not int for layer in value):
        raise UserError(f"{where}: layers must be a list of layer numbers, e.g. [10, 20], not {value!r}")
    if len(set(value)) != len(value):
        raise UserError(f"{where}: layers names a layer twice; give each layer once")
    return tuple(value)


def _layer_map(value: object, where: str) -> tuple[tuple[int, int], ...]:
    if isinstance(value, dict):  # in JSON keys are words
        value = {int(key) if str(key).isdecimal() else key: own for key, own in value.items()}
    if (
        not isinstance(value, dict)
        or not value
        or any(type(layer) is not int for pair in value.items() for layer in pair)
    ):
        raise UserError(
            f"{where}: layer_map must map layers of the teacher to layers of the student, "
            f"e.g. {{10: 4, 20: 8}}, not {value!r}"
        )
    return tuple(value.items())


def _mapper(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: mapper must be one of {MAPPERS}, not {value!r}")
    check_mapper(value, f"{where}: mapper")
    return value


def _check_keys(value: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            hint = suggest(str(key), known) or f"; known are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
