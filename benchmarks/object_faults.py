"""A thousand faults of an object store, while stores are written and read there.

A proxy stands before a real server of the S3 protocol (moto's) and does to a quarter of all requests what
services do on a bad day: it answers 500, 503, 429 or SlowDown, waits, cuts a reply short, carries a request
out and loses the reply, or resets the connection. From time to time every request is refused until somebody
does something about it, because credentials have expired or a clock is wrong; and the disk of one process is
full while it writes and while it reads (a limit on the size of files stands for that). In each round two
writers race for the shards of a new store, and a reader without copies follows. Then the store is looked
through without faults: every commit has to be there, every file as its hash says, every sample once and equal
to what was given, and nothing left over after `gc`.

"recovers in" is the time from a fault to the next sound reply about the same object, and of a slow reply how
long it takes. An operation that is refused says why in one line and is then run again, as a user would; both
writers may be refused for one cause.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import ROOT, table, write_result

os.environ["PYTHONPATH"] = str(ROOT)
sys.path.insert(0, str(ROOT))

import boto3

from featurestore.storage.remote import RemoteRoot
from tests.faults import PASSING, FaultyProxy
from tests.featurestore.bad_day import BadDay, write_and_read
from tests.s3 import Bucket, environment, running

FAULTS, SHARE, SAMPLES = 1000, 0.25, 12
FILES, FILE_BYTES = 24, 2 << 20


def seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({max(values):.2f} s)" if values else "–"


def faults(endpoint: str, bucket: Bucket) -> str:
    """Rounds until there were enough."""
    day, rounds, start = BadDay(SHARE, seed=3), 0, time.perf_counter()
    with FaultyProxy(endpoint, day.choose).running() as proxy:
        while sum(proxy.counts[kind] for kind in PASSING) + day.struck.total() < FAULTS:
            rounds += 1
            url = bucket.url(f"round-{rounds}")
            write_and_read(url, endpoint, proxy, day, bucket.mirrors, rounds, SAMPLES)
            print(f"round {rounds}: {dict(proxy.counts)}, {dict(day.struck)}", flush=True)
    passing = [[kind, str(proxy.counts[kind]), seconds(proxy.recoveries[kind]), "0", "0"] for kind in PASSING]
    lasting = [
        [kind, str(count), "refused in one line, and done when run again", "0", "0"]
        for kind, count in day.struck.items()
    ]
    total = sum(proxy.counts[kind] for kind in PASSING) + day.struck.total()
    lines = [*passing, *lasting, ["all", str(total), "", "0", "0"]]
    header = ["fault", "times", "recovers in: median (longest)", "commits or samples lost", "wrong or twice"]
    said = sorted(
        {line.replace(bucket.name, "bucket") for line in day.lines if re.search(r"/round-1\b", line)}
    )
    return (
        f"{table(header, lines)}\n\n{rounds} stores, {rounds * SAMPLES} samples and {proxy.requests:,} "
        f"requests in {time.perf_counter() - start:.0f} s; {len(day.lines)} operations were refused, for "
        f"{day.struck.total()} faults that do not pass.\n\nWhat was said in the first round:\n\n"
        + "\n".join(f"- `{line.replace(str(bucket.mirrors), '~/mirrors')}`" for line in said)
    )


def speeds(uploads: list[Callable[[int], object]]) -> list[str]:
    """MB/s of the quickest of five of each, by turns; the first of all is not counted."""
    times: list[list[float]] = [[] for _ in uploads]
    for i in range(6):
        for upload, taken in zip(uploads, times, strict=True):
            begun = time.perf_counter()
            upload(i)
            taken.append(time.perf_counter() - begun)
    return [f"{FILES * FILE_BYTES / 1e6 / min(taken[1:]):.0f} MB/s" for taken in times]


def throughput(endpoint: str, bucket: Bucket) -> str:
    """A bundle's files against one multipart upload of the same bytes, with faults and without."""
    chance = np.random.default_rng(0)
    contents = [chance.bytes(FILE_BYTES) for _ in range(FILES)]

    def bundle(through: str, store: str) -> Callable[[int], object]:
        def upload(i: int) -> object:
            os.environ["AWS_ENDPOINT_URL"] = through
            root = RemoteRoot(bucket.url(store), bucket.mirrors / store)
            name = f"bundle-{i}"
            directory = root.begin(name)
            for at, data in enumerate(contents):
                (directory / str(at)).write_bytes(data)
            root.settle(name)
            root.finish(name)
            return None

        return upload

    def multipart(through: str) -> Callable[[int], object]:
        client = boto3.client("s3", endpoint_url=through)
        whole = bucket.mirrors / "whole"
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_bytes(b"".join(contents))
        return lambda i: client.upload_file(str(whole), bucket.name, f"whole-{i}")

    rows = []
    for name, share in (("none", 0.0), ("5 % of requests", 0.05)):
        day = BadDay(share, seed=5)
        with FaultyProxy(endpoint, day.choose).running() as proxy:
            rows.append([name, *speeds([bundle(proxy.url, f"speed-{share}"), multipart(proxy.url)])])
    header = ["faults", f"a bundle of {FILES} files of 2 MiB", "boto3's multipart upload of the same bytes"]
    return table(header, rows)


def main() -> None:
    """Run both parts on one server."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with running(home / "server.log") as endpoint:
            os.environ.update(environment(endpoint, home / "mirrors"))
            bucket = Bucket(endpoint, "bad-day-bucket", home / "mirrors")
            found = faults(endpoint, bucket)
            speed = throughput(endpoint, bucket)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\n{found}\n\n## Upload\n\nThrough the same proxy on loopback, the quickest of five. The "
        f"proxy and moto take most of the time.\n\n{speed}"
    )
    write_result("object_faults", "An object store's bad day", body)


if __name__ == "__main__":
    main()
