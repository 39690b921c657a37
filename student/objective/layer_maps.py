"""Which layer of the teacher goes with which layer of the student: mappers, and pairs written out.

Indices count as in transformers' `output_hidden_states` on both sides: 0 is the embeddings, `depth` the state
behind the last layer. A mapper chooses among the layers that the cache holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from student.errors import UserError

MAPPERS = "all, last, last-K (as last-3), uniform or uniform+last"
Pairs = list[tuple[int, int]]


def map_layers(
    mapper: str, cached: Sequence[int], teacher_depth: int, student_depth: int, where: str = "--mapper"
) -> Pairs:
    """(teacher index, student index) pairs, no pair twice.

    all: each cached layer with the student's at the same relative depth (Uniform-Cons). uniform: each student
    layer with the cached layer nearest in relative depth. uniform+last: those, and each student layer with
    the deepest cached one. last, last-K: the deepest K cached layers with the student's last K. Names after
    arXiv:2310.08797. All but `all` leave the embeddings out. UserError, which `where` begins, where there are
    too few layers; the mapper itself must have passed `check_mapper`.
    """
    layers = sorted(set(cached))
    if mapper == "all":
        return depth_map(layers, teacher_depth, student_depth)
    blocks = [layer for layer in layers if layer > 0]
    count = _last_count(mapper)
    if not blocks or (count or 1) > min(len(blocks), student_depth):
        raise UserError(
            f"{where}: mapper {mapper} finds {len(blocks)} cached layers behind the embeddings and "
            f"{student_depth} of the student; choose fewer, or add layers with `distily-cache generate ... "
            "--hidden-layers 10,20`"
        )
    if count is not None:
        return list(zip(blocks[-count:], range(student_depth - count + 1, student_depth + 1), strict=True))
    pairs = [
        (_nearest(blocks, own * teacher_depth, student_depth), own) for own in range(1, student_depth + 1)
    ]
    if mapper == "uniform+last":
        pairs += [(blocks[-1], own) for _, own in pairs if (blocks[-1], own) not in pairs]
    return pairs


def depth_map(layers: Sequence[int], teacher_depth: int, student_depth: int) -> Pairs:
    """Pair each teacher index with the student index at the same relative depth, rounded half up."""
    return [(layer, (2 * layer * student_depth + teacher_depth) // (2 * teacher_depth)) for layer in layers]


def check_mapper(mapper: str, where: str) -> None:
    """UserError for an unknown mapper."""
    if mapper not in ("all", "uniform", "uniform+last") and _last_count(mapper) is None:
        raise UserError(f"{where} {mapper!r} is unknown; choose {MAPPERS}")


def _last_count(mapper: str) -> int | None:
    if mapper == "last":
        return 1
    match = re.fullmatch(r"last-([1-9][0-9]{0,3})", mapper)
    return int(match.group(1)) if match else None


def _nearest(layers: Sequence[int], numerator: int, denominator: int) -> int:
    """The layer nearest to numerator / denominator, the deeper one of two."""
    return min(reversed(layers), key=lambda layer: abs(layer * denominator - numerator))


def parse_layer_map(text: str) -> Pairs:
    """`"10:4,20:8"` -> [(10, 4), (20, 8)], teacher index before student index."""
    try:
        pairs = [(int(teacher), int(own)) for teacher, own in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise UserError(
            f"--layer-map {text!r} is not a list of TEACHER:STUDENT pairs; write e.g. --layer-map 10:4,20:8"
        ) from None
    if len(set(pairs)) != len(pairs):
        raise UserError(f"--layer-map {text!r} names a pair twice; give each pair once")
    return pairs


def parse_layers(text: str) -> list[int]:
    """`"10,20"` -> [10, 20]."""
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--hidden-layers {text!r} is not a list of numbers; write e.g. --hidden-layers 10,20"
        ) from None
    if len(set(layers)) != len(layers):
        raise UserError(f"--hidden-layers {text!r} names a layer twice; give each layer once")
    return layers


def check_pairs(pairs: Sequence[tuple[int, int]], teacher_depth: int, student_depth: int, flag: str) -> None:
    """UserError unless every index is within 0..depth of its model."""
    for teacher_layer, student_layer in pairs:
        for side, layer, depth in (
            ("teacher", teacher_layer, teacher_depth),
            ("student", student_layer, student_depth),
        ):
            if not 0 <= layer <= depth:
                raise UserError(
                    f"{flag}: {side} index {layer} is out of range; the {side}'s hidden states are numbered "
                    f"0 (embeddings) to {depth} (after the last layer)"
                )
