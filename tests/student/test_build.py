"""Students from a teacher's configuration and files: shapes, layer choice, and exactly which tensors
are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.config.flags import StudentOptions
from student.errors import UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.narrowing import plan_narrowing
from student.modeling.plan import plan_student
from student.modeling.shape import changed_config, choose_layers, tokenizers_differ
from tests import teachers
from tests.student.caches import random_samples, write_cache


@pytest.mark.parametrize(
    ("spec", "count", "depth", "chosen"),
    [
        ("uniform", 6, 30, [0, 6, 12, 17, 23, 29]),
        ("uniform", 1, 30, [0]),
        ("uniform", 30, 30, list(range(30))),
        ("first", 3, 30, [0, 1, 2]),
        ("last", 3, 30, [27, 28, 29]),
        ("4,4,9", 3, 30, [4, 4, 9]),
    ],
)
def test_layer_choice(spec: str, count: int, depth: int, chosen: list[int]) -> None:
    assert choose_layers(spec, count, depth) == chosen


@pytest.mark.parametrize("spec", ["uniform", "first", "0,1", "0,1,30", "a,b,c", "0,-1,2"])
def test_impossible_layer_choices_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="--copy-layers"):
        choose_layers(spec, 3 if "," in spec else 31, 30)


def test_layer_types_follow_the_chosen_layers(tmp_path: Path) -> None:
    teacher = AutoConfig.from_pretrained(teachers.gemma3(tmp_path, vocab_size=99))
    assert teacher.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    config, layers = changed_config(teacher, {"num_hidden_layers": 2}, "1,5")
    assert layers == [1, 5]
    assert config.layer_types == ["sliding_attention", "full_attention"]
    asked, _ = changed_config(teacher, {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "last")
    assert asked.layer_types == ["sliding_attention"]
    assert teacher.num_hidden_layers == 6


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_copies_exactly_the_chosen_layers(architecture: str, shard_size: str, tmp_path: Path) -> None:
    teacher = getattr(teachers, architecture)(tmp_path / "teacher", vocab_size=99)
    whole = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for file in teacher.glob("*.safetensors"):
        file.unlink()
    whole.save_pretrained(teacher, max_shard_size=shard_size)
    assert (len(list(teacher.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    store = write_cache(tmp_path / "store", teacher, random_samples(2, 99), [LogitsSpec(4)])
    plan = plan_student(
        StudentOptions(student_model_config='{"num_hidden_layers": 2}', copy_layers="2,0"),
        CacheReader.open(store),
    )
    student = plan.build()[0]
    own, theirs = dict(student.named_parameters()), dict(whole.named_parameters())
    for name, parameter in own.items():
        source = name.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("X", "2")
        assert torch.equal(parameter, theirs[source]), name
    assert plan.teacher is not None
    read = plan.teacher.read_names
    assert len(read) == len(set(read)) == len(own)
    assert not [name for name in read if "layers.1." in name or "layers.3." in name]


def test_an_untied_student_of_a_tied_teacher_starts_from_the_embeddings(cache: Path) -> None:
    options = StudentOptions(student_model_config='{"tie_word_embeddings": false}', freeze_embeddings=True)
    student = plan_student(options, CacheReader.open(cache)).build()[0]
    head, embeddings = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert head is not embeddings
    assert torch.equal(head, embeddings)
    assert not head.requires_grad
    assert not embeddings.requires_grad
    assert sum(p.requires_grad for p in student.parameters()) == len(list(student.parameters())) - 2


def test_bitnet_spares_head_and_embeddings(cache: Path) -> None:
    student = plan_student(StudentOptions(student_model_as_bitnet=True), CacheReader.open(cache)).build()[0]
    kinds = {name: type(module).__name__ for name, module in student.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert kinds["model.embed_tokens"] == "Embedding"
    in_layers = [kind for name, kind in kinds.items() if name.endswith("_proj")]
    assert in_layers == ["BitLinear"] * 7 * 3


def test_random_weights_need_no_teacher_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> None:
        raise AssertionError(f"looked for weights in {directory}")

    monkeypatch.setattr(CheckpointTensors, "__init__", lambda self, directory: refuse(directory))
    options = StudentOptions(student_model_config='{"hidden_size": 32, "head_dim": 16}', init="random")
    assert plan_student(options, CacheReader.open(cache)).build()[0].config.hidden_size == 32


def test_tokenizers_are_compared_by_their_vocabulary() -> None:
    one = {"model": {"vocab": {"a": 0, "b": 1}}}
    assert not tokenizers_differ(one, {"model": {"vocab": {"b": 1, "a": 0}}, "version": "1.0"})
    assert tokenizers_differ(one, {"model": {"vocab": {"a": 1, "b": 0}}})


def test_added_tokens_in_each_others_place_are_a_difference() -> None:
    def adding(**ids: int) -> dict[str, Any]:
        added = [{"id": index, "content": text} for text, index in ids.items()]
        return {"model": {"vocab": {"a": 0}}, "added_tokens": added}

    assert not tokenizers_differ(adding(think=1), adding(think=1, tool=2))
    assert tokenizers_differ(adding(think=1), adding(tool=1))
    assert tokenizers_differ(adding(think=1), adding(think=2, tool=3))


NARROW = '{"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2}'


def test_a_narrower_student_keeps_the_same_channels_everywhere(cache: Path, teacher: Path) -> None:
    """Of 64 residual channels three in four, of 128 inner ones too, of two heads of 32 the first."""
    student, _ = plan_student(StudentOptions(student_model_config=NARROW), CacheReader.open(cache)).build()
    wide = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    hidden = [index for index in range(64) if index % 4 != 3]
    inner = [index for index in range(128) if index % 4 != 3]
    head = list(range(32))
    own = student.state_dict()
    for name, rows, columns in (
        ("self_attn.q_proj", head, hidden),
        ("self_attn.k_proj", head, hidden),
        ("self_attn.v_proj", head, hidden),
        ("self_attn.o_proj", hidden, head),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ):
        theirs = wide[f"model.layers.2.{name}.weight"][rows][:, columns]
        assert torch.equal(own[f"model.layers.1.{name}.weight"], theirs), name
    assert torch.equal(own["model.embed_tokens.weight"], wide["model.embed_tokens.weight"][:, hidden])
    norm = "post_attention_layernorm.weight"
    assert torch.equal(own[f"model.layers.1.{norm}"], wide[f"model.layers.2.{norm}"][hidden])
    assert torch.equal(own["model.norm.weight"], wide["model.norm.weight"][hidden])


def test_query_heads_stay_with_the_key_head_that_they_share(tmp_path: Path) -> None:
    """Of 8 query heads on 4 key heads a student with 3 on 3 keeps the first of each pair it keeps."""
    kinds = [
        AutoConfig.for_model(
            "qwen3", hidden_size=64, head_dim=16, num_attention_heads=heads, num_key_value_heads=groups
        )
        for heads, groups in ((8, 4), (3, 3))
    ]
    kept = plan_narrowing(*kinds).kept
    assert kept.keys() == {"query", "key"}
    assert [int(row) // 16 for row in kept["key"][::16]] == [0, 1, 2]
    assert [int(row) // 16 for row in kept["query"][::16]] == [0, 2, 4]
    assert kept["query"][:16].tolist() == list(range(16))
    assert plan_narrowing(*kinds)("model.layers.0.self_attn.q_norm.weight", torch.ones(16)).shape == (16,)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ('{"hidden_size": 96}', "hidden_size 96 is more than the teacher's 64"),
        ('{"hidden_size": 32, "head_dim": 16}', "the student's heads are 16 wide, the teacher's 32"),
        ('{"num_attention_heads": 4}', "query heads per key and value head 4 is more than the teacher's 2"),
    ],
)
def test_widths_that_cannot_be_copied_are_refused(cache: Path, shape: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        plan_student(StudentOptions(student_model_config=shape), CacheReader.open(cache))
