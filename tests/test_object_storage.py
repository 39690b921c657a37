"""Both command lines on a store in object storage, as a user runs them: a real S3 server, a tiny teacher."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from featurestore.reader import CacheReader
from tests.command import call as run
from tests.s3 import Bucket, free_port
from tests.stores import lasting
from tests.teachers import text_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text_of(60, seed)}) for seed in range(16)))
    return file


def test_generate_look_after_and_train(
    tiny_teacher: Path, corpus: Path, bucket: Bucket, tmp_path: Path
) -> None:
    url = bucket.url("runs/cache")
    command = ("generate", tiny_teacher, corpus, "--out", url, "--engine", "transformers", "--top-k", 8)
    command = (*command, "--max-seq-len", 64, "--shard-tokens", 256)
    made = json.loads(run("distily-cache", *command, "--json").stdout)
    assert made["store"] == url and made["tokens"] > 0
    bucket.forget()
    before = bucket.names("runs/cache")
    assert "nothing to generate" in run("distily-cache", *command).stderr
    assert bucket.names("runs/cache") == before
    more = json.loads(run("distily-cache", *command, "--hidden-layers", 2, "--json").stdout)
    kept, after = (lasting(dict.fromkeys(names)).keys() for names in (before, bucket.names("runs/cache")))
    assert more["tokens"] == made["tokens"] and kept < after

    found = json.loads(run("distily-cache", "info", url, "--json").stdout)
    assert found["path"] == url and found["rows"] == made["tokens"]
    shards = json.loads(run("distily-cache", "ls", url, "--json").stdout)
    assert len(shards) > 2 and all(shard["complete"] for shard in shards)
    assert json.loads(run("distily-cache", "verify", url, "--deep", "--json").stdout)["problems"] == []
    run("distily-cache", "report", url, "--out", tmp_path / "page.html")
    assert f"{found['rows']:,}" in (tmp_path / "page.html").read_text()
    bucket.write("runs/cache", f"parts/{shards[0]['task']}-feedfeedfeed/samples.parquet", b"half")
    assert "removed" in run("distily-cache", "gc", url, "--min-age", 0, "--delete").stdout

    bucket.forget()
    out = tmp_path / "student"
    steps = ("--max-steps", 2, "--per-device-train-batch-size", 2, "--dataloader-num-workers", 2)
    changes = ("--student-model-config", '{"num_hidden_layers": 2}', "--init", "random")
    trained = run("distily-train", "from-cache", url, "--output-dir", out, *steps, *changes, "--json")
    assert json.loads(trained.stdout)["cache"] == url
    assert (out / "report.html").is_file()
    assert any("logits" in name for name in bucket.mirrored())
    assert not any("hidden" in name for name in bucket.mirrored() if name.startswith("parts/"))
    bucket.forget()
    victim = next(name for name in bucket.names("runs/cache") if name.endswith("head_index/c/0"))
    bucket.write("runs/cache", victim, None)
    assert victim in run("distily-cache", "verify", url, "--deep", code=1).stdout
    assert len(CacheReader.open(url)) == found["samples"]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_what_cannot_be_reached_is_said_before_the_teacher_is_looked_at(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = ("generate", tmp_path / "no-teacher", tmp_path / "no-data", "--out")

    def refused(url: str) -> str:
        line = one_line(run("distily-cache", *teacher, url, code=2))
        assert line.startswith("distily-cache: --out ")
        return line.removeprefix("distily-cache: --out ")

    missing = "s3://no-such-bucket/x"
    assert refused(missing) == f"{missing}: there is no such bucket\n"
    for program, *command in (
        ("distily-cache", "verify", missing),
        ("distily-train", "from-cache", missing, "--output-dir", tmp_path / "out"),
    ):
        assert one_line(run(program, *command, code=2)) == f"{program}: {missing}: there is no such bucket\n"
    assert "s3://bucket/prefix" in refused("ftp://host/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "no answer" in refused(bucket.url("x"))
    # Where a machine of the cloud asks for its credentials: nobody is there.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    line = refused(bucket.url("x"))
    assert "no credentials" in line and "AWS_ACCESS_KEY_ID" in line
