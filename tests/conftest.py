"""Fixtures that every suite shares: the demo teacher and its text, made once per session."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

# What is remembered of a data set that was tokenised is not shared with other runs of the tests.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="distily-tests-")
# Read when torch is imported. Test files run side by side, one a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when the hub's client is imported, so before anything that imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.s3 import bucket, s3_endpoint  # noqa: F401  (fixtures)

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs first, so that no worker is left with a long one at the end."""
    long = {item.path for item in items if item.get_closest_marker("vllm")}
    long |= {item.path for item in items if item.path.parent == Path(__file__).parent}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True, scope="module")
def loaded_modules_are_no_garbage() -> None:
    """What is loaded by now is not looked through again: Trainer collects garbage in every training, and a
    session holds millions of objects of torch, transformers and vLLM.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo teacher (`teacher/`) and its text (`topics.jsonl`)."""
    base = tmp_path_factory.getbasetemp()
    # Of several workers the first one makes it; their directories lie side by side.
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            subprocess.run([sys.executable, "-m", "pipeline.demo", str(directory)], check=True, timeout=900)
    return directory


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with V=199, D=64, 3 layers and 256 positions."""
    # Not above: the process that only gives out test files would load torch before it starts any worker.
    from tests import teachers

    return teachers.llama(tmp_path_factory.mktemp("tiny") / "teacher")
