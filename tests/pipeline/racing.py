"""Two real generators (transformers engine, tiny teacher) that race on one store and are killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from featurestore.format.schema import HiddenFeatures, LogitsFeatures
from featurestore.reader import CacheReader
from pipeline.request.generate import GenerateRequest
from tests import teachers

SAMPLES = 60


def make_request(teacher: Path, folder: Path, out: Path) -> GenerateRequest:
    """A request of SAMPLES short documents in shards of a few samples each."""
    corpus = folder / "racing.jsonl"
    if not corpus.exists():
        chance = np.random.default_rng(5)
        texts = [chance.choice(teachers.WORDS, size=8 + n % 17).tolist() for n in range(SAMPLES)]
        corpus.write_text("\n".join(json.dumps({"text": " ".join(words)}) for words in texts))
    return GenerateRequest(
        teacher=str(teacher),
        dataset=str(corpus),
        out=str(out),
        engine="transformers",
        dtype="float32",
        hidden_layers=(1,),
        hidden_dtype="int8",
        shard_tokens=48,
    )


class Told:
    """A reporter that tells a pipe when the capture begins and when a shard is captured."""

    def __init__(self, pipe: Connection | None) -> None:
        self._pipe = pipe

    def stage(self, text: str) -> None: ...
    def reading(self, rows: int) -> None: ...
    def tokenised(self, documents: int, tokens: int) -> None: ...

    def writing(self, texts_done: int, texts_total: int) -> None: ...

    def wrote(self, texts: int, tokens: int) -> None: ...

    def start(self, tokens_done: int, tokens_total: int) -> None:
        self._send()

    def advance(self, tokens: int) -> None: ...

    def skip(self, tokens: int) -> None: ...

    def committed(self, rows: int, size: int) -> None:
        self._send()

    def _send(self) -> None:
        if self._pipe is not None:
            self._pipe.send(None)


def generate(request: GenerateRequest, pipe: Connection | None = None) -> None:
    """Fulfil the request as the command does."""
    from pipeline.generate.run import execute, prepare

    report = Told(pipe)
    execute(prepare(request, report), report)


def race_and_kill(
    request: GenerateRequest,
    shards: int,
    seconds: float,
    run: Callable[[GenerateRequest, Connection], None] = generate,
) -> int:
    """Start two generators and kill both `seconds` after each has come to its n-th shard.

    run: what each of them does, a function of an importable module.

    Returns how many died of it. Counting shards keeps the moment where it belongs on a slow machine.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.pipeline.racing", "pipeline.generate.run", "torch", "transformers"])
    pipes = [server.Pipe(duplex=False) for _ in range(2)]
    pair = [server.Process(target=run, args=(request, pipes[i][1])) for i in range(2)]
    for process, (_, sender) in zip(pair, pipes, strict=True):
        process.start()
        sender.close()
    # A generator that has nothing left to do closes its end.
    with contextlib.suppress(EOFError):
        for _ in range(shards):
            for receiver, _ in pipes:
                receiver.recv()
    time.sleep(seconds)
    for process in pair:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    return sum(process.exitcode == -signal.SIGKILL for process in pair)


def assert_equal_stores(path: Path, undisturbed: Path) -> None:
    """Both hold the same samples, each once, with the same numbers to the last bit."""
    found, wanted = CacheReader.open(path), CacheReader.open(undisturbed)
    assert sorted(found.sample_ids) == sorted(wanted.sample_ids)
    assert len(set(found.sample_ids)) == len(found.sample_ids)
    place = {sample_id: i for i, sample_id in enumerate(wanted.sample_ids)}
    for i, sample_id in enumerate(found.sample_ids):
        ours, theirs = found.read(i), wanted.read(place[sample_id])
        assert ours.features.keys() == theirs.features.keys()
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        for spec, features in ours.features.items():
            other = theirs.features[spec]
            names = (
                ("counts", "ids", "logits", "lse", "label_logprob", "entropy", "tail_ids")
                if isinstance(features, LogitsFeatures)
                else ("values", "scale")
            )
            assert isinstance(features, LogitsFeatures | HiddenFeatures)
            for name in names:
                np.testing.assert_array_equal(getattr(features, name), getattr(other, name), err_msg=name)
