"""How opening, loading, ordering and publishing grow with a cache, at 10,000 to 1,000,000 shards.

The stores are synthetic: 64 samples of 512 tokens a shard. Their segments and manifests are made by the
product's own folding, from records that say what real ones would; only 16 shards have files of features and
commit records. Each number is of a process of its own; the files are in the page cache. A new manifest is the
first after 64 more shards were committed, the median of three; the new
ones hold tokens and no features.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, table, write_result

sys.path.insert(0, str(ROOT))

import numpy as np

from featurestore.catalogue import publishing
from featurestore.catalogue.columns import to_bytes
from featurestore.catalogue.files import ref_of
from featurestore.catalogue.folding import SEGMENT_SAMPLES, ListedTask, columns_of, finished, joined
from featurestore.catalogue.manifest import GroupTotals, Manifest, head_bytes, segment_name
from featurestore.catalogue.segment import Segment
from featurestore.format.directory import manifest_name, read_spec, teacher_listings
from featurestore.format.records import CommitRecord, read_commit_and_digest
from featurestore.format.schema import GroupSpec, LogitsSpec, group_id
from featurestore.identity import SAMPLES, digest
from featurestore.order import EpochOrder
from featurestore.reader import CacheReader
from featurestore.storage.protocol import HEADS
from featurestore.store import FeatureStore
from tests.featurestore.helpers import features, identity, sample, task_of

SIZES = [10_000, 100_000, 1_000_000]
SAMPLES_PER_SHARD, REAL, LENGTH, BATCH, PUBLICATIONS, NEW = 64, 16, 8, 8, 3, 64
SPEC = LogitsSpec(4)
GROUP = group_id(SPEC)


def real_shards(store: FeatureStore, first: int, count: int, specs: list[GroupSpec]) -> list[ListedTask]:
    """Shards that are written and committed as `generate` does it, with samples of a few tokens."""
    listed = []
    for shard in range(first, first + count):
        members = [sample(shard * SAMPLES_PER_SHARD + n, LENGTH) for n in range(SAMPLES_PER_SHARD)]
        task = task_of(members)
        store.write_bundle(task, members, features(members, specs))
        names = [*map(group_id, specs), SAMPLES]
        records = {name: read_commit_and_digest(store.root, name, task.id) for name in names}
        listed.append(ListedTask(task=task, records=records))
    return listed


def make(path: Path, shards: int) -> None:
    """A store of that many shards, the first REAL of them readable."""
    store = FeatureStore.create(path, identity())
    store.put_teacher_files({"config.json": b"{}"})
    real = columns_of(real_shards(store, 0, REAL, [SPEC]))
    # Each further part has the columns of the real shards, with ids, digests and bundles of its own.
    chance, per_segment = np.random.default_rng(0), SEGMENT_SAMPLES // (REAL * SAMPLES_PER_SHARD)
    parts, refs = shards // REAL, []
    for start in range(0, parts, per_segment):
        numbers = range(start, min(start + per_segment, parts))
        columns = finished(joined([_renamed(real, chance, number == 0) for number in numbers]))
        data = to_bytes(columns)
        refs.append(ref_of(Segment(columns, "a new segment"), digest(data), len(data)))
        store.root.publish(segment_name(refs[-1].digest), data)
    records: dict[str, list[CommitRecord]] = {g: [] for g in (GROUP, SAMPLES)}
    for one in store.inventory().loose.values():
        for group, (record, _) in one.records.items():
            records[group].append(record)
    many = {g: GroupTotals().with_records(found) for g, found in records.items()}
    totals = {
        g: GroupTotals(
            tasks=parts * REAL,
            rows=parts * one.rows,
            files={name: parts * size for name, size in one.files.items()},
            stats={name: parts * value for name, value in one.stats.items()},
        )
        for g, one in many.items()
    }
    specs: dict[str, GroupSpec] = {GROUP: SPEC}
    manifest = Manifest(
        spec=read_spec(store.root)[1],
        teacher=tuple(teacher_listings(store.root)),
        groups=specs,
        segments=tuple(refs),
        totals=totals,
        lengths={3: parts * REAL * SAMPLES_PER_SHARD},
        runs={},
    )
    store.root.publish(manifest_name(manifest.digest), manifest.to_bytes())
    store.root.publish(f"{HEADS}/{manifest.head}", head_bytes(manifest.digest))
    shutil.rmtree(path / "pending")


def _renamed(columns: dict[str, Any], chance: np.random.Generator, as_they_are: bool) -> dict[str, Any]:
    if as_they_are:
        return columns
    names = ("task", "sample", "document", "record_digest", "record_bundle")
    fresh = {n: chance.integers(0, 256, columns[n].shape, np.uint8) for n in names}
    return {**columns, **fresh}


def memory() -> dict[str, float]:
    """Resident memory of this process, and what of it no file backs and no process shares, MB."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:] if line.endswith("kB")}
    return {"rss": kb["Rss"] / 1e3, "private": kb["Private_Dirty"] / 1e3}


def measure(path: str) -> dict[str, float]:
    """In this process: opening, the order, a first batch; publication comes in `publish`."""
    before, start = memory(), time.perf_counter()
    reader = CacheReader.open(path)
    opened, after = time.perf_counter(), memory()
    block = -(-len(reader) // reader.shards)
    order = EpochOrder(reader.manifest_digest, 0, 3, len(reader), block)
    middle = order[len(reader) // 2]
    ordered = time.perf_counter()
    # The real shards are the first ones: what is read of them stands for the samples of a batch, whose shards
    # are found in the whole cache.
    batch = [
        (reader.shard(index), reader.read(index % (REAL * SAMPLES_PER_SHARD), [SPEC]))
        for index in order[:BATCH]
    ]
    read = time.perf_counter()
    # The thread that fetches ahead finds those of all samples of the window meanwhile.
    window = [reader.shard(index) for index in order.window(order._place(0)[0]).tolist()]
    found = time.perf_counter()
    assert len(batch) == BATCH and len(set(window)) > 1 and 0 <= middle < len(reader)
    return {
        "open": opened - start,
        "open_mb": after["rss"] - before["rss"],
        "order": ordered - opened,
        "batch": read - ordered,
        "window": found - read,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def worker(path: str, method: str) -> dict[str, float]:
    """Private memory of a reader in a worker that reads a batch and places 256 samples of the whole cache."""
    import multiprocessing

    reader = CacheReader.open(path)
    for index in range(BATCH):
        reader.read(index, [SPEC])
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(reader, theirs))
    process.start()
    found: dict[str, float] = mine.recv()
    process.join()
    return found


def _work(reader: CacheReader, pipe: Any) -> None:
    # A first batch loads what decodes features; what is asked here is what the list of samples costs.
    for index in range(BATCH):
        reader.read(index, [SPEC])
    chance, before = np.random.default_rng(1), memory()
    own = pickle.loads(pickle.dumps(reader))
    for index in range(BATCH):
        own.read(index, [SPEC])
    for index in chance.integers(0, len(own), 256).tolist():
        own.shard(index)
    pipe.send({"growth": memory()["private"] - before["private"]})


def publish(path: str) -> dict[str, float]:
    """Seconds of a manifest after NEW commits, and the segments it wrote."""
    seconds, written = [], []
    for round_ in range(PUBLICATIONS):
        store = FeatureStore.open(path)
        real_shards(store, 10**7 + NEW * round_, NEW, [])
        before = {file.name for file in Path(path, "segments").iterdir()}
        start = time.perf_counter()
        publishing.publish_newest(FeatureStore.open(path).root, {})
        seconds.append(time.perf_counter() - start)
        new = [file for file in Path(path, "segments").iterdir() if file.name not in before]
        written.append(sum(file.stat().st_size for file in new))
    return {"publish": float(np.median(seconds)), "worst": max(seconds), "written_mb": max(written) / 1e6}


def plan(path: str) -> dict[str, float]:
    """Which of 4,096 wanted samples are there: a quarter is."""
    store = FeatureStore.open(path)
    reader = CacheReader.open(path)
    wanted = [reader.sample_ids[i] for i in range(1024)]
    wanted += [digest(str(n).encode()) for n in range(3072)]
    start = time.perf_counter()
    inventory = store.inventory()
    known = inventory.holding(wanted)
    inventory.committed(known)
    return {"plan": time.perf_counter() - start, "shards": float(len(known))}


MEASURES = {"measure": measure, "publish": publish, "plan": plan}


def run(what: str, path: Path, *arguments: str) -> dict[str, float]:
    """One measure in a process of its own."""
    command = [sys.executable, __file__, what, str(path), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def exponent(values: list[float]) -> str:
    """Of the power of the number of shards that fits best."""
    slope = np.polyfit(np.log(SIZES[: len(values)]), np.log(np.maximum(values, 1e-6)), 1)[0]
    return f"{slope:.2f}"


def main() -> None:
    found: list[dict[str, float]] = []
    folder = Path(os.environ.get("SCALE_DIR") or tempfile.mkdtemp(prefix="scale-"))
    try:
        for size in SIZES:
            path = folder / str(size)
            start = time.perf_counter()
            make(path, size)
            meta = {"made": time.perf_counter() - start}
            meta["segments_mb"] = sum(f.stat().st_size for f in (path / "segments").iterdir()) / 1e6
            meta["segments"] = float(len(list((path / "segments").iterdir())))
            meta["manifest_kb"] = sum(f.stat().st_size for f in path.glob("MANIFEST-*")) / 1e3
            run("measure", path)
            meta |= run("measure", path) | run("plan", path)
            for method in ("fork", "spawn"):
                meta[method] = run("worker", path, method)["growth"]
            meta |= run("publish", path)
            found.append(meta)
            print(size, meta, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _write(found)


def _write(found: list[dict[str, float]]) -> None:
    rows = []
    for name, key, form in (
        ("segments", "segments", "{:,.0f}"),
        ("segment files, MB", "segments_mb", "{:,.0f}"),
        ("manifest, kB", "manifest_kb", "{:,.0f}"),
        ("open a reader, s", "open", "{:.3f}"),
        ("its memory (RSS growth), MB", "open_mb", "{:.1f}"),
        ("a further worker, fork: private MB", "fork", "{:.1f}"),
        ("a further worker, spawn: private MB", "spawn", "{:.1f}"),
        ("order of an epoch, from its middle, s", "order", "{:.4f}"),
        ("first batch, s", "batch", "{:.2f}"),
        ("shards of all samples of its window, s", "window", "{:.2f}"),
        ("plan 4,096 samples, s", "plan", "{:.2f}"),
        ("new manifest after 64 commits, s (median)", "publish", "{:.2f}"),
        ("the same, worst of three", "worst", "{:.2f}"),
        ("segments written for it, MB (most)", "written_mb", "{:.1f}"),
    ):
        values = [one[key] for one in found]
        rows.append([name, *(form.format(value) for value in values), exponent(values)])
    header = ["", *(f"{size:,} shards, {size * SAMPLES_PER_SHARD:,} samples" for size in SIZES), "exponent"]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = f"{intro}\n\n{table(header, rows[:])}\n\n{paper(found[-1])}"
    write_result("scale", "How costs grow with the size of a cache", body)


def paper(largest: dict[str, float]) -> str:
    """What 100 billion tokens would be, by these numbers."""
    tokens, length, bytes_per_token, groups = 100e9, 512, 40, 2
    samples = tokens / length
    shards = samples / SAMPLES_PER_SHARD
    per_shard = largest["segments_mb"] * 1e6 / SIZES[-1]
    files = shards * (9 * 2 + 2 + 1 + groups)
    puts = files + shards
    segments = samples / SEGMENT_SAMPLES
    merged = shards * per_shard * math.log2(64) / 1e9
    put, get, stored = 5e-6, 0.4e-6, 0.023
    rows = [
        ["samples of 512 tokens", f"{samples:,.0f}"],
        ["shards of 64 samples", f"{shards:,.0f}"],
        ["features at 40 bytes a token", f"{tokens * bytes_per_token / 1e12:,.1f} TB"],
        ["objects (arrays and metadata of a logits group, samples, 2 commit records)", f"{files:,.0f}"],
        ["segments, each of 2^18 samples", f"{segments:,.0f}"],
        ["bytes of segments", f"{shards * per_shard / 1e9:,.1f} GB ({per_shard / 1e3:.1f} kB a shard)"],
        [
            "bytes written as segments, with all merges (log2(4,096 / 64) times)",
            f"{merged:,.0f} GB",
        ],
        ["PUT requests (objects, and a marker for each shard)", f"{puts:,.0f}"],
        ["money for these", f"${puts * put:,.0f}"],
        ["GET requests of one epoch on one machine (a logits group, samples)", f"{shards * 20:,.0f}"],
        ["money for these", f"${shards * 20 * get:,.0f}"],
        ["a month of storage", f"${tokens * bytes_per_token / 1e9 * stored:,.0f}"],
    ]
    return (
        "## On paper: 100 billion tokens on an object store\n\nPrices assumed: $5 per million PUT or LIST "
        "requests, $0.40 per million GET requests, $0.023 per GB and month, no traffic out of the region.\n\n"
        f"{table(['', 'amount'], rows)}\n\nShards of 64 samples are small for this: with 1,024 samples a "
        "shard (524,288 tokens), objects, requests and their price fall by 16; see `--shard-tokens`."
    )


if __name__ == "__main__":
    if len(sys.argv) > 3:
        print(json.dumps(worker(sys.argv[2], sys.argv[3])))
    elif len(sys.argv) > 2:
        print(json.dumps(MEASURES[sys.argv[1]](sys.argv[2])))
    else:
        main()
