"""Saved BitNet students: stock transformers computes the same or refuses, and ours loads all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from featurestore.reader import CacheReader
from student import bitnet
from student.config.flags import StudentOptions
from student.errors import UserError
from student.export.generation import load
from student.modeling.plan import plan_student
from student.modeling.saving import load_student, new_student, save_student
from tests.student.test_conversion import tiny
from tests.student.test_ternary_layers import samples


def saved(kind: str, conversion: str, directory: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    student = new_student(tiny(kind, initializer_range=0.2, **settings)).eval()
    bitnet.convert_calibrated(student, conversion, samples())
    save_student(student, directory, directory)
    return student


def assert_same_function(one: Any, other: Any) -> None:
    """Both quantise alike. Rounding before a quantiser may move an activation by one of its 127 steps, and
    with it all that comes later; the first position, which sees itself alone, is spared here.
    """
    with torch.no_grad():
        ours, theirs = (model(samples()[1][None]).logits[0] for model in (one, other))
    assert (ours[0] - theirs[0]).norm() <= 1e-5 * ours[0].norm()
    assert (ours - theirs).norm() <= 1e-2 * ours.norm()


@pytest.mark.parametrize(
    ("kind", "conversion", "architecture"),
    [
        ("llama", "subln", "BitNetForCausalLM"),
        ("mistral", "subln", "BitNetForCausalLM"),
        ("llama", "per-projection", "LlamaForCausalLM"),
        ("qwen3", "per-projection", "Qwen3ForCausalLM"),
        ("gemma3_text", "per-projection", "Gemma3ForCausalLM"),
        ("phi3", "none", "Phi3ForCausalLM"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_stock_transformers_computes_the_same(
    kind: str, conversion: str, architecture: str, tied: bool, tmp_path: Path, eager: None
) -> None:
    settings = {"sliding_window": None} if kind == "mistral" else {}
    student = saved(kind, conversion, tmp_path, tie_word_embeddings=tied, **settings)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_function(student, theirs.eval())


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "mistral", "gemma2", "granite", "smollm3"])
def test_what_stock_transformers_cannot_compute_it_refuses(kind: str, tmp_path: Path) -> None:
    """It would leave the norms out."""
    saved(kind, "subln", tmp_path)
    with pytest.raises((ValueError, KeyError), match=f"subln-{kind}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("conversion", bitnet.CONVERSIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_load_student_gives_the_same_student(kind: str, conversion: str, tmp_path: Path) -> None:
    student = saved(kind, conversion, tmp_path)
    again = load_student(tmp_path)
    assert type(again) is type(student)
    assert not again.training
    assert bitnet.conversion_of(again) == conversion
    own, theirs = student.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    with torch.no_grad():
        assert torch.equal(student(samples()[1][None]).logits, again(samples()[1][None]).logits)


def test_a_full_precision_student_generates_with_its_soft_cap(tmp_path: Path) -> None:
    """transformers' SDPA would leave it out."""
    student = new_student(tiny("gemma2", attn_logit_softcapping=0.05, initializer_range=0.5)).eval()
    save_student(student, tmp_path, tmp_path)
    with torch.no_grad():
        assert torch.equal(student(samples()[1][None]).logits, load(tmp_path)(samples()[1][None]).logits)


def test_load_student_refuses_what_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_student(tmp_path)
    saved("llama", "none", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, reason in (
        ({"quantization_config": {"quant_method": "bitnet", "quantization_mode": "offline"}}, "no latent"),
        ({"model_type": "unheard-of"}, "not a student"),
        ({"num_hidden_layers": 3}, "the checkpoint lacks"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=reason) as error:
            load_student(tmp_path)
        assert "\n" not in str(error.value)


def test_a_checkpoint_keeps_its_conversion(tmp_path: Path, cache: Path) -> None:
    shape = '{"num_hidden_layers": 1}'
    made = StudentOptions(student_model_config=shape, student_model_as_bitnet=True, bitnet_conversion="subln")
    reader = CacheReader.open(cache)
    student, _ = plan_student(made, reader).build(samples()[:1])
    save_student(student, tmp_path, reader.teacher_dir)
    again, drift = plan_student(StudentOptions(student=str(tmp_path)), reader).build(samples()[:1])
    assert drift is None
    assert bitnet.conversion_of(again) == "subln"
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in student.state_dict().items())
    for options, reason in (
        ({"bitnet_conversion": "none"}, "--bitnet-conversion none: .* was trained with subln"),
        ({"student_model_as_bitnet": False}, "--student-model-as-bitnet False: .* has norms"),
    ):
        with pytest.raises(UserError, match=reason):
            plan_student(StudentOptions(student=str(tmp_path), **options), reader)  # type: ignore[arg-type]
