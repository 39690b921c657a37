"""An object store that fails in every way that its protocol knows: nothing is lost, wrong or there twice."""

from __future__ import annotations

import pytest

from tests.command import call
from tests.faults import LASTING, PASSING, FaultyProxy
from tests.featurestore.bad_day import DISK_FULL, BadDay, write_and_read
from tests.s3 import Bucket


def test_nothing_is_lost_on_a_bad_day(bucket: Bucket) -> None:
    """The same a thousand times: benchmarks/object_faults.py."""
    day = BadDay(share=0.25)
    with FaultyProxy(bucket.endpoint, day.choose).running() as proxy:
        write_and_read(bucket.url("store"), bucket.endpoint, proxy, day, bucket.mirrors, seed=1, count=3)
    assert all(proxy.counts[kind] > 2 for kind in PASSING), proxy.counts
    assert set(day.struck) == {*LASTING, DISK_FULL}
    said = "\n".join(day.lines)
    for words in ("the credentials have expired", "clock", "free space there"):
        assert words in said


@pytest.mark.parametrize(
    ("kind", "words"), [("expired", "have expired; renew them"), ("skewed", "the clock")]
)
def test_what_does_not_pass_ends_a_command_at_once(
    kind: str, words: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(bucket.endpoint, lambda *_: kind).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for program, *command in (
            ("distily-cache", "info", bucket.url("store")),
            ("distily-train", "from-cache", bucket.url("store"), "--output-dir", "out"),
        ):
            done = call(program, *command, code=2)
            assert words in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert 0 < proxy.requests <= 6, "asked again and again"
