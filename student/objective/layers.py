"""Which layer of the student learns from which cached layer of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from student.errors import UserError


def parse_layer_map(text: str) -> list[tuple[int, int]]:
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


def depth_map(layers: Sequence[int], teacher_depth: int, student_depth: int) -> list[tuple[int, int]]:
    """Pair each teacher index with the student index at the same relative depth, rounded half up."""
    return [(layer, (2 * layer * student_depth + teacher_depth) // (2 * teacher_depth)) for layer in layers]


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
