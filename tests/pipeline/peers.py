"""Encoders of the peers' layouts, number by number and bit by bit, to test the decoders against."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FLOATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


def float_bytes(value: float, dtype: str) -> tuple[bytes, float]:
    """(the bytes, the value that they stand for)."""
    if dtype == "bfloat16":
        data = struct.pack("<f", value)[2:]
        return data, struct.unpack("<f", b"\0\0" + data)[0]
    data = struct.pack(FLOATS[dtype], value)
    return data, struct.unpack(FLOATS[dtype], data)[0]


def bit_bytes(values: list[int], bits: int) -> bytes:
    """Highest bit first, one behind the other, zeros at the end."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def compress(logprobs: list[float], config: dict[str, Any]) -> tuple[bytes, list[float]]:
    """DistillKit's bytes of one position, and the log-probabilities that they stand for."""
    delta = config.get("delta_encoding", True)
    values = [v - (logprobs[i - 1] if i and delta else 0.0) for i, v in enumerate(logprobs)]
    data, stands = b"", []
    for value in values[: config["exact_k"]]:
        more, known = float_bytes(value, config.get("exact_dtype", "float32"))
        data += more
        stands.append(known)
    rest = values[config["exact_k"] :]
    fit = [0.0] * len(rest)
    if config.get("polynomial_terms") and rest:
        t = [i / max(len(rest) - 1, 1) if config.get("normalize_t") else float(i) for i in range(len(rest))]
        x = [[term_of(one, term) for term in config["polynomial_terms"]] for one in t]
        found = np.linalg.lstsq(np.array(x), np.array(rest), rcond=1e-9)[0]
        coefficients = []
        for one in found:
            more, known = float_bytes(float(one), config.get("term_dtype", "float32"))
            data += more
            coefficients.append(known)
        fit = [sum(a * b for a, b in zip(row, coefficients, strict=True)) for row in x]
    elif config.get("polynomial_terms"):
        data += b"".join(
            float_bytes(0.0, config.get("term_dtype", "float32"))[0] for _ in config["polynomial_terms"]
        )
    residual = [a - b for a, b in zip(rest, fit, strict=True)]
    for one in config["residual_bins"]:
        taken, residual = residual[: one["num_elements"]], residual[one["num_elements"] :]
        bits = one["element_bits"]
        half = 1 if bits == 1 else 2 ** (bits - 1)
        more, scale = float_bytes(max(map(abs, taken)) / half or 1.0, one["scale_dtype"])
        data += more
        if bits == 1:
            steps = [int(value >= 0) for value in taken]
            known_residual = [(2 * step - 1) * scale for step in steps]
        else:
            steps = [min(max(round(v / scale), -half), half - 1) + half if scale else half for v in taken]
            known_residual = [(step - half) * scale for step in steps]
        data += bit_bytes(steps, bits)
        stands += [a + b for a, b in zip(fit, known_residual, strict=False)]
        fit = fit[len(taken) :]
    stands += fit
    return data, list(np.cumsum(stands)) if delta else stands


def term_of(t: float, term: int | str) -> float:
    return {"sqrt": math.sqrt, "exp": math.exp}[term](t) if isinstance(term, str) else t**term


def write_distillkit(
    folder: Path, texts: list[list[int]], heads: list[list[dict[int, float]]], config: dict[str, Any]
) -> list[list[dict[int, float]]]:
    """A data set as DistillKit's vLLM script writes it; returns the heads that its bytes stand for."""
    import yaml

    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    bits = math.ceil(math.log2(config["d"]))
    columns: dict[str, list[Any]] = {"input_ids": texts, "compressed_logprobs": [], "bytepacked_indices": []}
    told = []
    for rows in heads:
        packed, indices, known = [], [], []
        for head in rows:
            ranked = sorted(head.items(), key=lambda entry: -entry[1])
            data, stands = compress([logprob for _, logprob in ranked], config)
            packed.append(list(data))
            indices.append(list(bit_bytes([token for token, _ in ranked], bits)))
            known.append(dict(zip([token for token, _ in ranked], stands, strict=True)))
        columns["compressed_logprobs"].append(packed)
        columns["bytepacked_indices"].append(indices)
        told.append(known)
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    pq.write_table(pa.table(columns, schema=schema), folder / "data_0.parquet")
    return told


def write_axolotl(
    file: Path, texts: list[list[int]], heads: list[list[dict[int, float]]], prompt: int, own: bool
) -> None:
    """A prepared data set; `heads[i][t]` is of the token at t + 1. The first `prompt` tokens are no labels.

    `own`: rows are moved behind the tokens that they describe, as before June 2025.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
    }
    for tokens, rows in zip(texts, heads, strict=True):
        width = max(map(len, rows))
        nothing: dict[int, float] = {}
        placed = [nothing, *rows[: len(tokens) - 1]] if own else [*rows[: len(tokens) - 1], nothing]
        # The mask is of the token that a row describes.
        described = range(len(tokens)) if own else range(1, len(tokens) + 1)
        labels = [-100 if i < prompt else token for i, token in enumerate(tokens)]
        columns["input_ids"].append(tokens)
        columns["labels"].append(labels)
        pads = [range(width - len(row)) for row in placed]
        columns["target_token_ids"].append([[*row, *pad] for row, pad in zip(placed, pads, strict=True)])
        columns["target_logprobs"].append(
            [[*row.values(), *(-math.inf for _ in pad)] for row, pad in zip(placed, pads, strict=True)]
        )
        columns["target_mask"].append([[int(i >= prompt)] * width for i in described])
    pq.write_table(pa.table(columns), file)


def texts_and_heads(
    count: int, vocab_size: int, k: int, seed: int = 0, length: int = 30
) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
    """Texts, and for each position but the last a head of `k` that mostly gives the next token much."""
    rng = np.random.default_rng(seed)
    texts, heads = [], []
    for _ in range(count):
        tokens = rng.integers(3, vocab_size, int(rng.integers(length // 2, length))).tolist()
        rows = []
        for following in tokens[1:]:
            others = [int(i) for i in rng.permutation(vocab_size) if i != following]
            names = [following, *others[: k - 1]] if rng.random() < 0.8 else others[:k]
            weights = np.sort(rng.random(k) ** 4 + 1e-4)[::-1]
            weights[0] += weights.sum()
            logprobs = np.log(weights / weights.sum() * rng.uniform(0.6, 0.99))
            rows.append(dict(zip(names, logprobs.tolist(), strict=True)))
        texts.append(tokens)
        heads.append(rows)
    return texts, heads
