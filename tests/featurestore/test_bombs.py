"""Small files that would unpack to gigabytes: refused in one line, where there is no memory for them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numcodecs import blosc

from distily.safety.parquet_pages import check_pages
from featurestore.errors import CorruptionError
from featurestore.format.plan import Task
from featurestore.format.schema import LogitsSpec, group_id
from featurestore.format.tables import PLAN_SCHEMA, SAMPLE_SCHEMA, plan_from_bytes, plan_to_bytes
from featurestore.identity import digest, seal, unseal
from tests.featurestore.conftest import Filled, copy_of, fill
from tests.featurestore.helpers import sample, task_of
from tests.featurestore.test_hostile import refused, relist, restamp
from tests.featurestore.version1 import as_version_1

LOGITS = LogitsSpec(4, tail=3)
# What Python, Arrow and a sound store of this size need, and far below what any of the bombs takes.
SPARE = 160 * 2**20
# Opens and audits a store with that much memory beyond what the imports have taken.
READ = f"""
import resource, sys
import featurestore.maintenance.verify, featurestore.maintenance.info, pyarrow.parquet, pyarrow.compute
from featurestore.errors import FeatureStoreError
from featurestore.reader import CacheReader
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {SPARE}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    reader = CacheReader.open(sys.argv[1])
    for index in range(len(reader)):
        reader.read(index)
except FeatureStoreError as error:
    print(f"refused: {{error}}")
print(featurestore.maintenance.verify.verify_store(sys.argv[1], deep=True).problems[:1])
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    made = fill(tmp_path_factory.mktemp("sound") / "store", [LOGITS], count=3, shard_tokens=1000)
    as_version_1(made.path)
    return made


@pytest.fixture
def victim(sound: Filled, tmp_path: Path) -> Filled:
    return copy_of(sound, tmp_path / "store")


def read_in_little_memory(store: Path) -> str:
    """The one line with which a reader refuses the store."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(store)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, problems = done.stdout.strip().split("\n")
    # Not that memory ran out, which Arrow says as an error of its own.
    assert refused.startswith("refused: ") and re.search("are possible|no id has", refused), refused
    assert problems != "[]"
    return refused


def parquet(table: pa.Table, rows_of_group: int = 2**30) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_of_group, write_page_checksum=True)
    return sink.getvalue()


def repeated(rows: int, text: str = "1" * 32) -> pa.Table:
    """A plan that says the same in each of so many rows."""
    columns = [pa.repeat(pa.scalar(value), rows) for value in ("0" * 16, text)]
    return pa.table([*columns, pa.repeat(pa.scalar(1, pa.int32()), rows)], schema=PLAN_SCHEMA)


def constant_samples(task: Task, tokens: int) -> pa.Table:
    """A row for each sample of the task, all tokens in the first."""
    count = len(task.lengths)
    offsets = pa.array([0, *[tokens] * count], pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.repeat(pa.scalar(0, pa.int32()), tokens)),
        pa.ListArray.from_arrays(offsets, pa.repeat(pa.scalar(False), tokens)),
    ]
    lengths = pa.array(task.lengths, pa.int32())
    return pa.table([pa.array(task.sample_ids), lengths, *lists], schema=SAMPLE_SCHEMA)


@pytest.mark.parametrize(("rows", "text"), [(3_000_000, "1" * 32), (200, "x" * 2**20)])
def test_plans_that_expand(victim: Filled, rows: int, text: str) -> None:
    bomb = repeated(rows, text)
    data = parquet(bomb)
    assert len(data) < 200_000 and bomb.nbytes > SPARE
    for old in victim.path.glob("plan-*"):
        old.unlink()
    name = f"plan-{digest(data)}.parquet"
    (victim.path / name).write_bytes(data)
    relist(victim, lambda r: r.update(plans=[name]))
    assert name in read_in_little_memory(victim.path)


def test_samples_that_expand(victim: Filled) -> None:
    task = task_of(list(victim.samples.values()))
    data = parquet(constant_samples(task, 2**26))
    assert len(data) < 100_000
    file = next(victim.path.glob("parts/*/samples.parquet"))
    file.write_bytes(data)
    restamp(victim, file)
    assert "samples.parquet" in read_in_little_memory(victim.path)


def chunks_of(data: bytes) -> list[tuple[SimpleNamespace, int]]:
    """Where the column chunks lie; all that a footer says beside that may be a lie, and is left out."""
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    names = ("dictionary_page_offset", "data_page_offset", "total_compressed_size")
    columns = [group.column(i) for i in range(group.num_columns)]
    return [(SimpleNamespace(**{n: getattr(c, n) for n in names}), c.num_values) for c in columns]


def test_page_headers_count_whatever_the_footer_says() -> None:
    rows = 100_000
    for chunk, values in chunks_of(data := parquet(repeated(rows))):
        assert values == rows
        assert check_pages(data, chunk, rows, 2**22)[0] == rows
        with pytest.raises(ValueError, match="its pages claim to unpack to"):
            check_pages(data, chunk, rows - 1, 2**22)
    zeros = pa.table([pa.array([b"\0" * 2**24] * 4)], names=["x"])
    for chunk, values in chunks_of(data := parquet(zeros)):
        assert len(data) < 20_000
        with pytest.raises(ValueError, match="its pages claim to unpack to"):
            check_pages(data, chunk, values, 2**20)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_page_headers_are_read_as_arrow_writes_them(version: str, dictionary: bool) -> None:
    random = np.random.default_rng(0)
    lists = pa.array([random.integers(0, 9, n, np.int32) for n in random.integers(1, 500, 300)])
    table = pa.table([lists, pa.array([f"{n:032x}" for n in range(300)])], names=["a", "b"])
    sink = io.BytesIO()
    options = {"data_page_version": version, "use_dictionary": dictionary, "data_page_size": 4096}
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    data = sink.getvalue()
    meta = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    for i, (chunk, values) in enumerate(chunks_of(data)):
        found, unpacked = check_pages(data, chunk, 2**20, 2**24)
        assert found == values
        # The footer counts the headers of the pages too.
        assert 0 < unpacked <= meta.column(i).total_uncompressed_size


def test_real_plans_are_within_the_limits() -> None:
    tasks = [task_of([sample(100 * i + j, length=3) for j in range(50)]) for i in range(40)]
    assert plan_from_bytes(plan_to_bytes(tasks), "here") == tasks
    assert plan_from_bytes(plan_to_bytes(tasks[:1]), "here") == tasks[:1]


def test_inner_chunks_that_share_their_bytes(victim: Filled) -> None:
    folder = next(victim.path.glob(f"parts/*/{group_id(LOGITS)}/head_index"))
    meta = json.loads((folder / "zarr.json").read_text())
    rows = meta["shape"][0]
    assert rows > 2
    # One row a chunk, and each chunk the same bytes.
    meta["codecs"][0]["configuration"]["chunk_shape"] = [1]
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [rows]
    (folder / "zarr.json").write_text(json.dumps(meta))
    body = blosc.compress(bytes(2), b"zstd", 5, 1)
    chunk = body + google_crc32c.value(body).to_bytes(4, "little")
    index = np.array([[0, len(chunk)]] * rows, "<u8").tobytes()
    (folder / "c" / "0").write_bytes(chunk + index + google_crc32c.value(index).to_bytes(4, "little"))
    restamp(victim, folder / "zarr.json")
    restamp(victim, folder / "c" / "0")
    assert "head_index/c/0: inner chunks overlap" in refused(victim, CorruptionError)


@pytest.mark.parametrize("kind", ["spec", "commit", "teacher", "provenance", "manifest", "written"])
def test_json_of_nothing_but_brackets(kind: str) -> None:
    """It takes thirty times its size as Python objects: 3 bytes for an empty list of 56 and its pointer."""
    size = 2**24
    data = b'{"x":[' + b"[]," * (size // 3) + b"[]]}"
    with pytest.raises(CorruptionError, match=f"here: .*(a {kind} record has|are no {kind} record)"):
        unseal(data, "here", kind)


def test_sealed_json_within_the_limits() -> None:
    """The densest that a writer makes: texts of one token each, and tasks with one group."""
    texts = [["0" * 32, number, [7]] for number in range(20_000)]
    tasks = {f"{number:016x}": {"samples": "0" * 32} for number in range(20_000)}
    for kind, record in (("written", {"texts": texts}), ("manifest", {"tasks": tasks})):
        data = seal({"format": f"distily-cache/{kind}", "version": 1, **record})
        assert unseal(data, "here", kind).keys() >= record.keys()
