"""The peers' layouts: what their bytes stand for, at every position, is what comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.interchange.layouts.axolotl import Axolotl
from pipeline.interchange.layouts.base import Document, to_imported
from pipeline.interchange.layouts.distillkit import DistillKit, decode_logprobs, read_compression, unpack_bits
from tests.pipeline.peers import bit_bytes, compress, texts_and_heads, write_axolotl, write_distillkit

# As in DistillKit's README: of its published sets, and recommended for new ones.
PUBLISHED = {"d": 151_936, "k": 20, "exact_k": 8, "polynomial_terms": [0, 1, 2], "residual_bins": []}
RECOMMENDED = {
    "d": 199,
    "k": 20,
    "exact_k": 4,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 5}],
    "delta_encoding": False,
    "normalize_t": True,
}
CONFIGS = st.fixed_dictionaries(
    {
        "d": st.integers(2, 300_000),
        "k": st.integers(1, 40),
        "exact_k": st.integers(0, 10),
        "exact_dtype": st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
        "polynomial_terms": st.lists(st.sampled_from([0, 1, 2, 3, "sqrt"]), unique=True, max_size=4),
        "term_dtype": st.sampled_from(["float32", "float64"]),
        "bins": st.lists(
            st.fixed_dictionaries(
                {
                    "scale_dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
                    "element_bits": st.integers(1, 13),
                    "num_elements": st.integers(1, 9),
                }
            ),
            max_size=3,
        ),
        "delta_encoding": st.booleans(),
        "error_diffusion": st.booleans(),
        "normalize_t": st.booleans(),
    }
)


def fitting(config: dict[str, Any]) -> dict[str, Any]:
    """The same with no more exact values and bins than entries."""
    exact_k = min(config["exact_k"], config["k"])
    left, bins = config["k"] - exact_k, []
    for one in config["bins"]:
        if one["num_elements"] <= left:
            bins.append(one)
            left -= one["num_elements"]
    return {**{k: v for k, v in config.items() if k != "bins"}, "exact_k": exact_k, "residual_bins": bins}


def read(config: dict[str, Any], folder: Path) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return read_compression(path)


@pytest.mark.parametrize("config", [PUBLISHED, RECOMMENDED])
def test_the_configurations_of_the_readme(config: dict[str, Any], tmp_path: Path) -> None:
    logprobs = np.sort(np.random.default_rng(0).exponential(2.0, config["k"]))[::-1] * -1.0
    data, stands = compress(sorted(logprobs.tolist(), reverse=True), config)
    compression = read(config, tmp_path)
    assert compression.row_bytes[0] == len(data)
    found = decode_logprobs(np.frombuffer(data, np.uint8)[None], compression)[0]
    np.testing.assert_allclose(found, stands, rtol=1e-6, atol=1e-6)
    exact = config["exact_k"]
    np.testing.assert_allclose(found[:exact], sorted(logprobs, reverse=True)[:exact], rtol=0.01)


@settings(max_examples=150, deadline=None)
@given(drawn=CONFIGS, seed=st.integers(0, 2**32 - 1))
def test_bytes_stand_for_what_was_encoded(
    drawn: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = fitting(drawn)
    rng = np.random.default_rng(seed)
    rows = [sorted((-rng.exponential(3.0, config["k"])).tolist(), reverse=True) for _ in range(3)]
    encoded = [compress(row, config) for row in rows]
    compression = read(config, tmp_path_factory.mktemp("config"))
    data = np.array([list(one) for one, _ in encoded], dtype=np.uint8).reshape(3, -1)
    assert data.shape[1] == compression.row_bytes[0]
    found = decode_logprobs(data, compression)
    np.testing.assert_allclose(found, [stands for _, stands in encoded], rtol=1e-5, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 31), data=st.data())
def test_bit_packing(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = np.frombuffer(bit_bytes(values, bits), np.uint8)
    assert unpack_bits(np.stack([packed, packed]), bits, len(values)).tolist() == [values, values]


@pytest.mark.parametrize(("d", "bits"), [(2, 1), (199, 8), (65_536, 16), (65_537, 17), (151_936, 18)])
def test_bits_of_an_index(d: int, bits: int, tmp_path: Path) -> None:
    assert read({**PUBLISHED, "d": d}, tmp_path).index_bits == bits


@pytest.mark.parametrize(
    "change",
    [
        {"d": 0},
        {"k": "many"},
        {"exact_k": 21},
        {"exact_dtype": "int8"},
        {"polynomial_terms": ["sin"]},
        {"residual_bins": [{"scale_dtype": "float16", "element_bits": 0, "num_elements": 1}]},
        {"residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 13}]},
        {"residual_bins": None},
        {"vocab_size": 5},
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--compression"):
        read({**PUBLISHED, **change}, tmp_path)


def documents(layout: DistillKit | Axolotl, file: Path) -> list[Document]:
    table = pq.read_table(file).select(layout.columns)
    return [one for index in range(len(table)) for one in layout.documents(table.slice(index, 1))]


def heads_of(document: Document) -> list[dict[int, float]]:
    """The finite entries of every position."""
    cuts = np.cumsum(document.counts)[:-1]
    pairs = zip(np.split(document.ids, cuts), np.split(document.logprobs, cuts), strict=True)
    return [
        {int(i): float(p) for i, p in zip(ids, logprobs, strict=True) if math.isfinite(p)}
        for ids, logprobs in pairs
    ]


def assert_heads(found: list[dict[int, float]], wanted: list[dict[int, float]]) -> None:
    assert [set(head) for head in found] == [set(head) for head in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_distillkit_rows_describe_the_next_token(tmp_path: Path) -> None:
    texts, heads = texts_and_heads(3, 199, 20)
    told = write_distillkit(tmp_path / "captured", texts, heads, RECOMMENDED)
    layout = DistillKit(
        ["input_ids", "compressed_logprobs", "bytepacked_indices"],
        tmp_path / "captured" / "compression_config.yaml",
    )
    found = documents(layout, tmp_path / "captured" / "data_0.parquet")
    for document, text, rows in zip(found, texts, told, strict=True):
        assert document.tokens.tolist() == text and document.learned.all()
        assert_heads(heads_of(document), [*rows, {}])


def test_distillkit_plain_and_packed(tmp_path: Path) -> None:
    """Two documents in a row with an attention mask of 1s and 2s, and padding."""
    texts, heads = texts_and_heads(2, 199, 6)
    # A packed row is cut to the tokens that have distributions.
    tokens = [t for text in texts for t in text[:-1]] + [0]
    rows = [head for text_rows in heads for head in text_rows] + [dict.fromkeys(range(6), -math.inf)]
    attention = [1] * len(heads[0]) + [2] * len(heads[1]) + [0]
    table = pa.table(
        {
            "input_ids": [tokens],
            "token_ids": [[list(head) for head in rows]],
            "top_values": [[list(head.values()) for head in rows]],
            "attention_mask": [attention],
        }
    )
    pq.write_table(table, tmp_path / "packed.parquet")
    found = documents(DistillKit(table.column_names, None), tmp_path / "packed.parquet")
    assert [one.tokens.tolist() for one in found] == [text[:-1] for text in texts]
    for document, wanted in zip(found, heads, strict=True):
        assert_heads(heads_of(document), wanted)


def test_distillkit_refuses(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="legacy"):
        DistillKit(["input_ids", "packed_indices", "exact_values", "coeffs"], None)
    with pytest.raises(RequestError, match="its columns are text"):
        DistillKit(["text"], None)
    with pytest.raises(RequestError, match="--compression"):
        DistillKit(["input_ids", "compressed_logprobs", "bytepacked_indices"], None)
    texts, heads = texts_and_heads(1, 199, 20)
    write_distillkit(tmp_path / "captured", texts, heads, RECOMMENDED)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**RECOMMENDED, "d": 300}))
    layout = DistillKit(["input_ids", "compressed_logprobs", "bytepacked_indices"], tmp_path / "other.yaml")
    with pytest.raises(RequestError, match="bytes of bytepacked_indices"):
        documents(layout, tmp_path / "captured" / "data_0.parquet")


@pytest.mark.parametrize("own", [False, True])
def test_axolotl(tmp_path: Path, own: bool) -> None:
    texts, heads = texts_and_heads(3, 199, 5)
    heads[0][9] = dict(list(heads[0][9].items())[:2])  # a narrower one, padded
    write_axolotl(tmp_path / "a.parquet", texts, heads, prompt=4, own=own)
    found = documents(Axolotl(pq.read_schema(tmp_path / "a.parquet").names, own), tmp_path / "a.parquet")
    for document, text, rows in zip(found, texts, heads, strict=True):
        assert document.tokens.tolist() == text
        assert document.learned.tolist() == [i >= 4 for i in range(len(text))]
        # The first four tokens are the prompt: what describes them is masked.
        assert_heads(heads_of(document), [*({} for _ in range(3)), *rows[3:], {}])


def test_axolotl_refuses_raw_data() -> None:
    with pytest.raises(RequestError, match="axolotl preprocess"):
        Axolotl(["messages", "logprobs"], own=False)


def document(heads: list[dict[int, float]], tokens: list[int]) -> Document:
    return Document(
        tokens=np.array(tokens),
        learned=np.ones(len(tokens), bool),
        counts=np.array([len(head) for head in heads]),
        ids=np.array([i for head in heads for i in head]),
        logprobs=np.array([p for head in heads for p in head.values()], np.float64),
    )


def test_what_is_stored() -> None:
    """Order, closed heads, gaps, labels: one row of each kind."""
    log = math.log
    heads: list[dict[int, float]] = [
        {7: log(0.1), 5: log(0.6)},  # out of order; the label 5 is in it
        {},  # nothing known: the label 6 is not learned
        {1: log(0.9), 2: log(0.6)},  # more than one
        {1: log(0.5), 2: log(0.5)},  # one, by rounding or not
        {3: -math.inf, 4: -1e9, 8: log(0.2)},  # padding
    ]
    got = to_imported(document(heads, [4, 5, 6, 2, 9]), 10, "here")
    features = got.features
    assert features.counts.tolist() == [2, 1, 2, 2, 1]
    assert features.ids.tolist() == [5, 7, 0, 1, 2, 1, 2, 8]
    wanted = [0.6, 0.1, 0.1, 0.6, 0.4, 0.5, 0.5, 0.2]
    np.testing.assert_allclose(np.exp(features.logits), wanted, rtol=1e-5)
    assert got.sample.loss_mask.tolist() == [True, True, False, True, True]
    label = features.label_logprob
    np.testing.assert_allclose(np.exp(label[[0, 2]]), [0.6, 0.4], rtol=1e-5)
    assert np.isnan(label[[1, 3, 4]]).all() and np.isnan(features.entropy).all() and not features.lse.any()
    assert (got.renormalised, got.unknown) == (1, 1)
    np.testing.assert_allclose(got.fits, [0.5, 0.6 + 0.4, 0.0], rtol=1e-5)


def test_a_token_named_twice_counts_once() -> None:
    twice = Document(
        tokens=np.array([1, 2]),
        learned=np.ones(2, bool),
        counts=np.array([3, 0]),
        ids=np.array([2, 4, 2]),
        logprobs=np.log([0.1, 0.2, 0.5]),
    )
    features = to_imported(twice, 10, "here").features
    assert features.ids.tolist() == [2, 4, 0]
    np.testing.assert_allclose(np.exp(features.logits[:2]), [0.5, 0.2], rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "head"), [([1, 10], {2: -1.0}), ([1, 2], {10: -1.0}), ([1, 2], {-1: -1.0})]
)
def test_ids_outside_the_vocabulary_are_refused(tokens: list[int], head: dict[int, float]) -> None:
    with pytest.raises(RequestError, match="vocabulary ends at 9"):
        to_imported(document([head, {}], tokens), 10, "here")


def test_a_head_that_a_store_cannot_count_is_refused() -> None:
    """Its size is 16 bits wide, and 2^16 tokens would be none."""
    head = dict.fromkeys(range(2**16), -math.log(2**16))
    with pytest.raises(RequestError, match="65,536 tokens; a store keeps 65,535"):
        to_imported(document([head, {}], [1, 2]), 2**17, "here")


def test_compression_of_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdef", "bcdefg", strict=True)
    ]
    file = tmp_path / "compression.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(RequestError, match=r"--compression .* aliases repeat"):
        read_compression(file)
