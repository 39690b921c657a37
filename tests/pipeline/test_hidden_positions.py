"""`--hidden-positions`: what is stored, what it covers, and what `plan` says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from featurestore.format.positions import kept_positions
from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from tests.command import call, generate
from tests.teachers import text_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text_of(60, i)}) for i in range(6)))
    return file


def test_a_share_of_the_positions_is_stored(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store, layers = tmp_path / "store", ("--top-k", 0, "--hidden-layers", "1,2")
    generate(tiny_teacher, corpus, tmp_path / "all", *layers)
    share = (*layers, "--seed", 4, "--hidden-positions")
    planned = call(
        "distily-cache",
        *("plan", tiny_teacher, corpus, "--out", store, "--engine", "transformers", *share, 0.25, "--json"),
    )
    forecast = json.loads(planned.stdout)
    # bf16 of 64 numbers and a number of the position, of a quarter of them, in two layers.
    assert forecast["bytes_to_write"] == round(forecast["tokens"] * 2 * 0.25 * (128 + 1))
    assert generate(tiny_teacher, corpus, store, *share, 0.25)["tokens"]
    assert not generate(tiny_teacher, corpus, store, *share, 0.1)["tokens"], "a smaller share is there"
    reader, every = CacheReader.open(store), CacheReader.open(tmp_path / "all")
    assert set(reader.groups.values()) == {HiddenSpec(layer, "bf16", 0.25, 4) for layer in (1, 2)}
    for index, sample_id in enumerate(reader.sample_ids):
        expected = kept_positions(sample_id, reader.lengths[index], 0.25, 4)
        exact = every.read(list(every.sample_ids).index(sample_id)).features
        for spec, found in reader.read(index).features.items():
            np.testing.assert_array_equal(found.positions, expected)
            states = exact[HiddenSpec(spec.layer)].to_float32()
            np.testing.assert_array_equal(found.to_float32(), states[expected])
    assert "positions 0.25" in " ".join(call("distily-cache", "info", store).stdout.split())


def test_a_larger_share_stores_the_further_positions_alone(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Also of a data set that has grown meanwhile, of which new samples are stored at once; and up to all
    positions. What is read is what a capture of all positions has.
    """
    store, layers = tmp_path / "store", ("--top-k", 0, "--hidden-layers", "1,2")
    share = (*layers, "--seed", 4, "--hidden-positions")
    first, further, rest = (
        {HiddenSpec(layer, "bf16", b, 4, above=a) for layer in (1, 2)}
        for a, b in ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))
    )
    generate(tiny_teacher, corpus, store, *share, 0.25)
    planned = call(
        "distily-cache",
        *("plan", tiny_teacher, corpus, "--out", store, "--engine", "transformers", *share, 0.5, "--json"),
    )
    forecast = json.loads(planned.stdout)
    assert forecast["bytes_to_write"] == round(forecast["tokens"] * 2 * 0.25 * (128 + 1))
    assert generate(tiny_teacher, corpus, store, *share, 0.5)["tokens"]
    assert set(CacheReader.open(store).groups.values()) == first | further
    with corpus.open("a") as file:
        file.write("\n" + "\n".join(json.dumps({"text": text_of(60, i)}) for i in range(6, 9)))
    for wanted, flags in (
        ({HiddenSpec(layer, "bf16", 0.5, 4) for layer in (1, 2)}, (*share, 0.5)),
        ({HiddenSpec(1), HiddenSpec(2)}, layers),
    ):
        assert generate(tiny_teacher, corpus, store, *flags)["tokens"]
        assert not generate(tiny_teacher, corpus, store, *flags)["tokens"], "all of it is there"
        reader = CacheReader.open(store)
        assert {reader.find(f"hidden.L{layer}") for layer in (1, 2)} == wanted
    assert set(reader.groups.values()) == first | further | rest | {
        HiddenSpec(layer, "bf16", 0.5, 4) for layer in (1, 2)
    }
    generate(tiny_teacher, corpus, tmp_path / "all", *layers)
    every = CacheReader.open(tmp_path / "all")
    for index, sample_id in enumerate(reader.sample_ids):
        exact = every.read(list(every.sample_ids).index(sample_id)).features
        found = reader.read(index).features
        assert set(found) == {HiddenSpec(1), HiddenSpec(2)}
        for spec in found:
            np.testing.assert_array_equal(found[spec].to_float32(), exact[spec].to_float32())
    assert call("distily-cache", "verify", store, "--deep").returncode == 0


def test_final_states_and_inputs_of_blocks_are_stored_whole(
    tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    flags = ("--hidden-layers", "1,2", "--hidden-positions", 0.5, "--final", "--relation-layers", 1)
    generate(tiny_teacher, corpus, tmp_path / "store", "--top-k", 0, *flags)
    found = set(CacheReader.open(tmp_path / "store").groups.values())
    assert found == {HiddenSpec(1), HiddenSpec(2, "bf16", 0.5), HiddenSpec(3)}
