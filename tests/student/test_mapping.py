"""Layer mappers: what is paired with what, over any cache and any two depths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.errors import UserError
from student.objective.layer_maps import (
    check_mapper,
    check_pairs,
    depth_map,
    map_layers,
    parse_layer_map,
    parse_layers,
)

DEPTHS = st.integers(1, 80)


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(cached layers with at least one behind the embeddings, teacher depth, student depth)."""
    teacher, student = draw(DEPTHS), draw(DEPTHS)
    layers = draw(st.sets(st.integers(0, teacher), min_size=1).filter(lambda some: some != {0}))
    return sorted(layers), teacher, student


@given(caches(), st.sampled_from(["all", "last", "uniform", "uniform+last"]))
def test_pairs_are_of_cached_layers_and_of_the_student_and_each_once(
    cache: tuple[list[int], int, int], mapper: str
) -> None:
    layers, teacher, student = cache
    pairs = map_layers(mapper, layers, teacher, student)
    assert pairs and len(set(pairs)) == len(pairs)
    assert {theirs for theirs, _ in pairs} <= set(layers)
    check_pairs(pairs, teacher, student, "--mapper")
    assert map_layers(mapper, layers[::-1], teacher, student) == pairs


@given(caches())
def test_all_takes_each_cached_layer_once_in_order(cache: tuple[list[int], int, int]) -> None:
    layers, teacher, student = cache
    pairs = map_layers("all", layers, teacher, student)
    assert [theirs for theirs, _ in pairs] == layers
    assert [own for _, own in pairs] == sorted(own for _, own in pairs)
    for theirs, own in pairs:
        assert abs(own / student - theirs / teacher) <= 0.5 / student + 1e-12


@given(caches())
def test_uniform_serves_each_student_layer_once_with_the_nearest(cache: tuple[list[int], int, int]) -> None:
    layers, teacher, student = cache
    pairs = map_layers("uniform", layers, teacher, student)
    assert [own for _, own in pairs] == list(range(1, student + 1))
    assert [theirs for theirs, _ in pairs] == sorted(theirs for theirs, _ in pairs)
    for theirs, own in pairs:
        best = min(abs(layer / teacher - own / student) for layer in layers if layer)
        assert abs(theirs / teacher - own / student) <= best + 1e-12


@given(caches())
def test_uniform_and_last_adds_the_deepest_to_every_student_layer(
    cache: tuple[list[int], int, int],
) -> None:
    layers, teacher, student = cache
    pairs = map_layers("uniform+last", layers, teacher, student)
    last = {(max(layers), own) for own in range(1, student + 1)}
    assert set(pairs) == last | set(map_layers("uniform", layers, teacher, student))


@given(caches(), st.integers(1, 80))
def test_last_k_pairs_the_ends_in_order(cache: tuple[list[int], int, int], count: int) -> None:
    layers, teacher, student = cache
    blocks = [layer for layer in layers if layer]
    if count > min(len(blocks), student):
        with pytest.raises(UserError, match=f"--mapper: mapper last-{count} finds {len(blocks)} cached"):
            map_layers(f"last-{count}", layers, teacher, student)
        return
    pairs = map_layers(f"last-{count}", layers, teacher, student)
    assert [theirs for theirs, _ in pairs] == blocks[-count:]
    assert [own for _, own in pairs] == list(range(student + 1))[-count:]
    if count == 1:
        assert pairs == map_layers("last", layers, teacher, student)


@given(DEPTHS)
def test_equal_depths_with_everything_cached_pair_equals(depth: int) -> None:
    layers = list(range(depth + 1))
    assert map_layers("all", layers, depth, depth) == list(zip(layers, layers, strict=True))
    assert map_layers("uniform", layers, depth, depth) == list(zip(layers[1:], layers[1:], strict=True))


def test_pairs_of_published_settings() -> None:
    everything = list(range(13))
    # TinyBERT, 4 of 12 layers: g(m) = 3m; PKD's last of 12 for 3.
    assert map_layers("uniform", everything, 12, 4) == [(3, 1), (6, 2), (9, 3), (12, 4)]
    assert map_layers("last-3", everything, 12, 6) == [(10, 4), (11, 5), (12, 6)]
    assert map_layers("uniform", [5, 10], 15, 2) == [(10, 1), (10, 2)]  # 7.5 is as near to both


@pytest.mark.parametrize("mapper", ["", "first", "last-0", "last--1", "last-x", "uniform-2", "Last"])
def test_unknown_mappers_are_refused(mapper: str) -> None:
    with pytest.raises(UserError, match=r"--mapper .* unknown; choose all, last"):
        check_mapper(mapper, "--mapper")


def test_the_embeddings_alone_serve_only_all() -> None:
    assert map_layers("all", [0], 3, 2) == [(0, 0)]
    with pytest.raises(UserError, match="--hidden-layers"):
        map_layers("uniform", [0], 3, 2)


def test_relative_depth_and_explicit_layer_maps() -> None:
    assert depth_map([0, 10, 20, 30], 30, 6) == [(0, 0), (10, 2), (20, 4), (30, 6)]
    assert depth_map([15], 30, 5) == [(15, 3)]  # 2.5 rounds up
    assert parse_layer_map("10:4,20:8") == [(10, 4), (20, 8)]
    assert parse_layers("10,20") == [10, 20]
    for text in ("10-4", "1:2,1:2", "1:2:3"):
        with pytest.raises(UserError, match="--layer-map"):
            parse_layer_map(text)
    for text in ("1,1", "x"):
        with pytest.raises(UserError, match="--hidden-layers"):
            parse_layers(text)
