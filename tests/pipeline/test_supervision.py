"""The one line that says why vLLM's processes ended."""

from __future__ import annotations

import os

import pytest

from pipeline.engines.llm import set_environment
from pipeline.engines.supervision import failure_cause

POINTERS = (
    "(EngineCore pid=7) RuntimeError: cancelled\n"
    "(EngineCore pid=7) ERROR 11-24 08:21:08 [core.py:9] RuntimeError: Worker failed with error 'x', please "
    "check the stack trace above for the root cause\n"
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
)


@pytest.mark.parametrize(
    ("codes", "log", "expected"),
    [
        (
            [-9],
            POINTERS,
            "the vLLM worker died: signal 9 (SIGKILL); the system does that when memory runs out: lower "
            "--max-num-batched-tokens",
        ),
        ([-11], "", "the vLLM worker died: signal 11 (SIGSEGV)"),
        (
            [1],
            "(Worker pid=8) ERROR 11-24 08:21:08 [w.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried\n"
            + POINTERS,
            "--max-num-batched-tokens",
        ),
        ([1], "(Worker pid=8) ValueError: no such kernel\n" + POINTERS, "failed: ValueError: no such kernel"),
        (
            [1],
            "ERROR [m.py:2] Worker proc VllmWorker-0 died unexpectedly\n" + POINTERS,
            "worker died: killed, perhaps by the system when memory ran out: lower --max-num-batched-tokens",
        ),
        ([1], POINTERS, "exit code 1"),
        ([], "", "exit code unknown"),
    ],
)
def test_causes(codes: list[int], log: str, expected: str) -> None:
    cause = failure_cause(codes, log)
    # Only `generate` knows what was committed; a promise here would be wrong at the first shard.
    assert "same command" not in cause and expected in cause and "\n" not in cause and len(cause) < 600


def test_processes_for_a_gpu_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses CUDA in a process that is forked from one that has asked for a GPU, as a request does."""
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    monkeypatch.setenv(name, "fork")
    set_environment(verbose=True)
    assert os.environ[name] == "fork"
    monkeypatch.delenv(name)
    set_environment(verbose=True)
    assert os.environ[name] == "spawn"
