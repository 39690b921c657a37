"""A student of a teacher whose class also sees: the text part alone, which is a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from featurestore.reader import CacheReader
from student.config.flags import StudentOptions
from student.modeling.plan import plan_student
from tests import architectures
from tests.command import call
from tests.teachers import text_of


def captured(kind: str, directory: Path, *flags: object) -> tuple[Path, Path]:
    """(teacher, its cache)"""
    teacher = architectures.make_multimodal(kind, directory / "teacher")
    corpus = directory / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(30, seed)}) for seed in range(8)))
    engine = ("--engine", "transformers", "--dtype", "float32", *flags)
    call("distily-cache", "generate", teacher, corpus, "--out", directory / "store", *engine)
    return teacher, directory / "store"


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_vl", "llava"])
def test_a_whole_copy_gives_the_teachers_logits(kind: str, tmp_path: Path) -> None:
    teacher, cache = captured(kind, tmp_path)
    if kind == "qwen3_vl":
        line = call("distily-train", "from-cache", cache, "--output-dir", tmp_path / "out", code=2).stderr
        assert "no model by itself" in line and "--student DIR" in line
        return
    student, _ = plan_student(StudentOptions(), CacheReader.open(cache)).build()
    whole = AutoModelForMultimodalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    ids = torch.arange(architectures.FIRST_TEXT_ID, architectures.VOCAB)[None]
    with torch.inference_mode():
        torch.testing.assert_close(student.eval()(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_student_is_trained_and_saved_as_a_text_model(tmp_path: Path) -> None:
    _, cache = captured("gemma3", tmp_path, "--final")
    shape = ["--student-model-config", '{"num_hidden_layers": 2}']
    flags = [*shape, "--eval-fraction", 0, "--max-steps", 1, "--report-to", "none"]
    call("distily-train", "from-cache", cache, "--output-dir", tmp_path / "out", *flags)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and "vision_config" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
