"""Weights that lie beside the model's are nobody's concern: not of the digest, nor of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import is_mistral_model_repo

from pipeline.engines.links import without_unused_weights
from pipeline.teacher.checkpoint import load_teacher
from tests import checkpoints, teachers
from tests.checkpoints import WEIGHTS

STRAY = ("consolidated.safetensors", "model.fp16.safetensors")


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A teacher with two other models beside it."""
    directory = teachers.llama(tmp_path / "teacher")
    other = (teachers.llama(tmp_path / "other", seed=1) / WEIGHTS).read_bytes()
    for name in STRAY:
        (directory / name).write_bytes(other)
    return directory


def read_by_vllm(directory: Path) -> set[str]:
    loader = DefaultModelLoader(LoadConfig(load_format="safetensors"))
    return {Path(file).name for file in loader._prepare_weights(str(directory), None, None, True, None)[1]}


@pytest.mark.parametrize("sharded", [False, True])
def test_the_digest_is_that_of_the_weights_that_are_used(crowded: Path, sharded: bool) -> None:
    if sharded:
        checkpoints.shard(crowded)
    before = load_teacher(str(crowded)).digest
    for name in STRAY:
        (crowded / name).unlink()
    assert load_teacher(str(crowded)).digest == before


def test_vllm_reads_the_weights_that_are_used(crowded: Path) -> None:
    assert read_by_vllm(crowded) == {WEIGHTS, *STRAY}, "vLLM ignores them by itself now"
    links = without_unused_weights(crowded)
    assert links is not None
    seen = Path(links.name)
    assert read_by_vllm(seen) == {WEIGHTS}
    assert not is_mistral_model_repo(str(seen))
    assert load_teacher(str(seen)).digest == load_teacher(str(crowded)).digest
    links.cleanup()
    assert not seen.exists()
    assert (crowded / WEIGHTS).is_file()


def test_a_directory_without_others_is_used_itself(tmp_path: Path) -> None:
    assert without_unused_weights(teachers.llama(tmp_path / "teacher")) is None
