"""How fast stored rows become training tensors, beside a plain memmap of the same numbers already decoded.

One process, warm page cache, training order (featurestore.order), batches of 16 samples. Ours: read codes
from the store (checksums included), pad, decode to head ids, log-probabilities, draws and their weights, as
training does. Memmap: the same numbers lie decoded in one .npy file per array; slices of it are padded in the
same way. In both the int8 layer ends as int8 values and a scale per position, as it travels to a device.
With DISTILLKIT=<a checkout of arcee-ai/DistillKit> its own code decompresses rows of its two published
settings, which hold a distribution only, from tensors in memory, 4,096 at a time. Rounds of all alternate;
the best of each is shown.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUN, table, write_result

from featurestore.format.codec import row_starts
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.order import EpochOrder
from featurestore.reader import CacheReader, CodedSample
from student.data.batches import Collator, pad
from student.data.decoding import decode_targets

BATCH, ROUNDS = 16, 15
PEER_ROWS = 4096
# DistillKit's README: (k, logprobs stored exactly, powers of the polynomial for the others).
PEERS = {
    'DistillKit "budget" (k=50)': (50, 1, [0, 1, "sqrt"]),
    'DistillKit "recommended" (k=128)': (128, 16, [0, 1, 2, 3, 4, "sqrt"]),
}


class Memmap:
    """Every field of the cache, decoded, in .npy files that are mapped."""

    def __init__(self, reader: CacheReader, logits: LogitsSpec, hidden: HiddenSpec, folder: Path) -> None:
        samples = [reader.read(i, [logits, hidden]) for i in range(len(reader))]
        heads, states = ([s.features[spec] for s in samples] for spec in (logits, hidden))
        fields: dict[str, list[Any]] = {
            "tokens": [s.tokens for s in samples],
            "mask": [s.loss_mask for s in samples],
            "counts": [h.counts for h in heads],
            "ids": [h.ids.view(np.int32) for h in heads],
            "logprobs": [h.logits - np.repeat(h.lse, h.counts) for h in heads],
            "lse": [h.lse for h in heads],
            "label_logprob": [h.label_logprob for h in heads],
            "entropy": [h.entropy for h in heads],
            "draws": [h.tail_ids for h in heads],
            "values": [h.values for h in states],
            "scale": [h.scale for h in states],
        }
        self.rows = row_starts(np.array([len(s.tokens) for s in samples]))
        self.entries = row_starts(np.array([len(h.ids) for h in heads]))
        self.arrays = {}
        for name, parts in fields.items():
            np.save(folder / f"{name}.npy", np.concatenate(parts))
            self.arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
        self.bytes = sum(array.nbytes for array in self.arrays.values())

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """The padded tensors of one batch."""
        length = max(int(self.rows[i + 1] - self.rows[i]) for i in indices)

        def cut(name: str, starts: np.ndarray = self.rows) -> list[np.ndarray]:
            return [self.arrays[name][starts[i] : starts[i + 1]] for i in indices]

        counts = pad(cut("counts"), length, np.int16)
        real = np.arange(int(counts.max())) < counts.numpy()[..., None]
        out = {
            "input_ids": pad(cut("tokens"), length, np.int64),
            "mask": pad(cut("mask"), length, np.bool_),
            "counts": counts,
            "draws": pad(cut("draws"), length, np.int32),
            "values": pad(cut("values"), length, np.int8),
        }
        for name in ("lse", "label_logprob", "entropy", "scale"):
            out[name] = pad(cut(name), length, np.float32)
        for name, fill in (("ids", 0), ("logprobs", -np.inf)):
            padded = np.full(real.shape, fill, self.arrays[name].dtype)
            padded[real] = np.concatenate(cut(name, self.entries))
            out[name] = torch.from_numpy(padded)
        return out


def batches(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def peer_steps(vocab: int) -> dict[str, Callable[[], object]]:
    """DistillKit's decompression of PEER_ROWS rows, by its own code, for each of its settings."""
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    logprobs = torch.log_softmax(3 * torch.randn(PEER_ROWS, vocab), -1)
    steps: dict[str, Callable[[], object]] = {}
    for name, (k, exact, powers) in PEERS.items():
        config = DistributionQuantizationConfig(
            d=vocab,
            k=k,
            exact_k=exact,
            exact_dtype="bfloat16",
            polynomial_terms=powers,
            term_dtype="float32",
            residual_bins=[],
            delta_encoding=False,
            error_diffusion=False,
        )
        compressor = LogprobCompressor(config)
        row = compressor.compress(logprobs)
        steps[name] = partial(compressor.decompress_to_sparse, row)
    return steps


def best_of(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest round of each; rounds alternate, after one of each to warm up."""
    found = dict.fromkeys(steps, float("inf"))
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_:
                found[name] = min(found[name], time.perf_counter() - began)
    return found


def main() -> None:
    torch.set_num_threads(1)
    reader = CacheReader.open(RUN / "cache")
    logits = reader.find("logits")
    hidden = next(
        (s for s in reader.groups.values() if isinstance(s, HiddenSpec) and s.dtype == "int8"), None
    )
    if hidden is None or not isinstance(logits, LogitsSpec) or not logits.tail:
        sys.exit(f"{RUN}/cache: draws and an int8 layer are needed; benchmarks/README.md has the command")
    block = -(-len(reader) // reader.shards)
    order = list(EpochOrder(reader.manifest_digest, 0, 0, len(reader), block))
    tokens = int(reader.lengths.sum())
    collate = Collator([logits, hidden], 0)

    def ours(decode: bool) -> None:
        for samples in read_batches():
            batch = collate(samples)
            if decode:
                rows = {name: part.flatten(0, 1) for name, part in batch["coded_head"].items()}
                decode_targets(rows, batch["labels"].flatten())

    def read_batches() -> Iterator[list[CodedSample]]:
        for chosen in batches(order):
            yield [reader.read_codes(i, [logits, hidden]) for i in chosen]

    with tempfile.TemporaryDirectory() as folder:
        mapped = Memmap(reader, logits, hidden, Path(folder))
        steps: dict[str, Callable[[], object]] = {
            "plain memmap, batches": lambda: [mapped.batch(chosen) for chosen in batches(order)],
            "ours, samples as stored (checksums, unpacking)": lambda: sum(1 for _ in read_batches()),
            "ours, padded batches as stored": lambda: ours(False),
            "ours, decoded batches": lambda: ours(True),
        }
        peers = {}
        if "DISTILLKIT" in os.environ:
            sys.path.insert(0, os.environ["DISTILLKIT"])
            peers = peer_steps(reader.identity.vocab_size)
        seconds = best_of(steps | peers)
    rates = {name: (PEER_ROWS if name in peers else tokens) / seconds[name] for name in seconds}
    plain, decoded = rates["plain memmap, batches"], rates["ours, decoded batches"]
    lines = [[n, f"{r:,.0f}", f"{r / plain:.2f}", f"{decoded / r:.1f}"] for n, r in rates.items()]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    what = (
        f"{tokens:,} positions, {len(reader)} samples, {reader.shards} shards; {logits}, {hidden}; "
        f"{mapped.bytes / tokens:.0f} bytes per position in the memmap. One thread."
    )
    body = table(["", "tokens/s", "of the memmap's rate", "ours decoded, times this"], lines)
    write_result("decode_speed", "From the store to training tensors", f"{intro}\n\n{what}\n\n{body}")


if __name__ == "__main__":
    main()
