"""Dense and relation terms on a real store with a sidecar, against transformers' own forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from featurestore.format import sidecar
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.format.sidecar import BlockSpec, HeadSpec
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from student.data.batches import IGNORE, CachedDataset, Collator
from student.losses.catalogue import Need, catalogue
from student.objective.terms import Objective, Term, term
from student.training.model import DistillationModel
from student.training.plan import load_teacher
from tests.student.caches import random_samples, write_cache

SPECS = [LogitsSpec(16), HiddenSpec(1, "f32"), HiddenSpec(3, "f32")]
DENSE = [name for name, loss in catalogue().items() if Need.FULL in loss.needs]
RELATION = [name for name, loss in catalogue().items() if loss.kind == "relation"]
GIVEN: dict[str, dict[str, Any]] = {"full_cakld": {"confidence": 0.4}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """What `generate --final --relation-layers 1` leaves: final states, input of block 1, and the sidecar."""
    path = tmp_path_factory.mktemp("full") / "store"
    write_cache(path, teacher, random_samples(12, 199), SPECS)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config, block = model.config, model.get_decoder().layers[1]
    head = HeadSpec(vocab_size=199, hidden_size=64, norm_eps=config.rms_norm_eps)
    attention = BlockSpec(
        layer=1,
        hidden_size=64,
        heads=2,
        kv_heads=1,
        head_dim=32,
        norm_eps=config.rms_norm_eps,
        attention_scale=32**-0.5,
        rope=dict(config.rope_parameters),
    )
    norm, linears = model.get_decoder().norm, {name: f"{name}_proj" for name in "qkv"}
    projections = {f"{key}.weight": getattr(block.self_attn, name).weight for key, name in linears.items()}
    parts: list[tuple[Any, dict[str, Tensor]]] = [
        (head, {"weight": model.lm_head.weight, "norm.weight": norm.weight}),
        (attention, {"input_norm.weight": block.input_layernorm.weight, **projections}),
    ]
    files = {}
    for spec, weights in parts:
        stored = {name: sidecar.Tensor("f32", w.detach().numpy()) for name, w in weights.items()}
        name, content = sidecar.part_file(spec, stored)
        files[name] = content
    writer = FeatureStore.open(path)
    writer.put_teacher_files(files)
    writer.publish_manifest()
    return path


def batch_of(store: Path) -> dict[str, Any]:
    dataset = CachedDataset(CacheReader.open(store), range(5), SPECS)
    return Collator(SPECS, 2)([dataset[index] for index in range(5)])


def student_of(teacher: Path, **changes: Any) -> Any:
    config = LlamaConfig.from_pretrained(teacher, attn_implementation="eager", **changes)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def term_of(name: str) -> Term:
    pair = (3, 3) if name in DENSE else (1, 1)
    return term(name, 1.0, pair, **GIVEN.get(name, {}))


def model_of(student: Any, store: Path, *names: str) -> DistillationModel:
    objective = Objective.of([term_of(name) for name in names])
    return DistillationModel(student, objective, load_teacher(objective, CacheReader.open(store)))


def measured(model: DistillationModel, batch: dict[str, Any]) -> Tensor:
    terms: Tensor = model.train()(**batch)["terms"]
    return terms


def test_dense_terms_are_those_of_both_models_logits(store: Path, teacher: Path) -> None:
    batch, student = batch_of(store), student_of(teacher)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    learned = batch["labels"] != IGNORE
    goal = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        z, t = (m(**inputs).logits[learned].double() for m in (student, goal))
    p, q = t.softmax(-1), z.softmax(-1)
    m = (p + q) / 2
    wanted = torch.stack(
        [
            (p * (p / q).log()).sum(-1).mean(),
            (q * (q / p).log()).sum(-1).mean(),
            ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2,
            (p - q).abs().sum(-1).mean() / 2,
            (z - t).square().mean(),
        ]
    )
    names = ["full_kl", "full_reverse_kl", "full_jsd", "full_tvd", "full_logit_mse"]
    got = measured(model_of(student, store, *names), batch)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_fisher_mse_is_the_diagonal_of_the_expected_squared_gradient(store: Path, teacher: Path) -> None:
    batch, student = batch_of(store), student_of(teacher)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    learned = batch["labels"] != IGNORE
    goal = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        own, theirs = (m.get_decoder()(**inputs).last_hidden_state[learned].double() for m in (student, goal))
    weight = goal.lm_head.weight.detach().double()
    p = (theirs @ weight.t()).softmax(-1)
    gradient_NVD = weight - (p @ weight).unsqueeze(1)
    fisher = (p.unsqueeze(-1) * gradient_NVD.square()).sum(1)
    wanted = (fisher * (own - theirs).square()).sum(-1).mean() / 2
    got = measured(model_of(student, store, "fisher_mse"), batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_attention_maps_and_outputs_are_those_of_both_models(store: Path, teacher: Path) -> None:
    batch, student = batch_of(store), student_of(teacher)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    learned = batch["labels"] != IGNORE
    goal = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager")
    maps, outputs = [], []
    for model in (student, goal):
        attention = model.get_decoder().layers[1].self_attn
        handle = attention.o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
        with torch.no_grad():
            maps.append(model(**inputs, output_attentions=True).attentions[1].double())
        handle.remove()
    q, p = maps
    kl = torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), 0.0).sum(-1).mean(1)
    gap = (outputs[0] - outputs[1]).double().square().mean(-1)
    wanted = torch.stack([kl[learned].mean(), gap[learned].mean()])
    got = measured(model_of(student, store, "attention_map", "attention_output"), batch)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_teacher_itself_scores_zero(store: Path, teacher: Path) -> None:
    itself = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    got = measured(model_of(itself, store, *DENSE, *RELATION), batch_of(store))
    assert got.abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*DENSE, *RELATION])
def test_every_term_falls_in_20_steps(name: str, store: Path, teacher: Path) -> None:
    batch, model = batch_of(store), model_of(student_of(teacher), store, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        output = model.train()(**batch)
        losses.append(output["loss"].item())
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, store: Path, teacher: Path) -> None:
    batch, student = batch_of(store), student_of(teacher)
    model = model_of(student, store, "full_jsd", "attention_map", "qkv_relation").train()
    model(**batch)["loss"].backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert wanted["model.layers.1.self_attn.k_proj.weight"].abs().max() > 0
    student.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch)["loss"].backward()
    for name, gradient in wanted.items():
        got = student.get_parameter(name).grad
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_student_of_other_widths_and_heads(store: Path, teacher: Path) -> None:
    narrow = student_of(
        teacher,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_hidden_layers=2,
    )
    objective = Objective.of(
        [term("full_reverse_kl", 1.0, (3, 2)), term("qkv_relation", 1.0, (1, 1)), term("ce", 1.0)]
    )
    model = DistillationModel(narrow, objective, load_teacher(objective, CacheReader.open(store))).train()
    output = model(**batch_of(store))
    output["loss"].backward()
    assert output["terms"].shape == (3,)
    assert torch.isfinite(output["terms"]).all()
    sums = model.eval()(**batch_of(store))["sums"]
    assert sums[:, 0].sum().item() / sums[:, 5].sum().item() == pytest.approx(output["loss"].item(), rel=1e-4)


def test_the_teacher_is_no_part_of_the_student(store: Path, teacher: Path) -> None:
    student = student_of(teacher)
    model = model_of(student, store, "full_kl", "key_relation")
    assert model.teachers[0].head is not None
    assert {name for name, _ in model.named_parameters()} == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    assert not [name for name in model.state_dict() if not name.startswith("student.")]
    assert [name for name, _ in model.named_buffers() if not name.startswith("student.")] == []


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{loss: full_kl}", "--final"),
        ("{loss: key_relation}", "--relation-layers 2"),
        ("{loss: key_relation, layers: [1]}", "--relation-layers 1"),
        ("{loss: attention_map, layer_map: {3: 0}}", "the teacher's are 0 to 2"),
    ],
)
def test_a_cache_without_the_parts_is_refused(
    content: str, message: str, cache: Path, tmp_path: Path, distily_train: Run
) -> None:
    file = tmp_path / "objective.yaml"
    file.write_text(f"terms: [{content}]\n")
    code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", "--objective", file)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{loss: attention_map}", "4 heads of 16"),
        ("{loss: attention_output}", "4 heads of 16"),
        ("{loss: qkv_relation, relation_heads: 5}", "does not divide"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    content: str, message: str, store: Path, tmp_path: Path, distily_train: Run
) -> None:
    file = tmp_path / "objective.yaml"
    file.write_text(f"terms: [{content}]\n")
    config = '{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}'
    arguments = ["--objective", file, "--init", "random", "--student-model-config", config]
    code, _, err = distily_train(store, "--output-dir", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err


def test_training_from_the_command_line(store: Path, tmp_path: Path, distily_train: Run) -> None:
    file = tmp_path / "objective.yaml"
    file.write_text(
        "terms: [{loss: full_jsd, beta: 0.3, temperature: 2.0}, {loss: qkv_relation, weight: 0.1}, "
        "{loss: ce}]\n"
    )
    arguments = ["--objective", file, "--max-steps", 3, "--report-to", "none", "--init", "random"]
    arguments += ["--student-model-config", '{"num_hidden_layers": 2}', "--student-model-as-bitnet"]
    code, _, err = distily_train(store, "--output-dir", tmp_path / "out", *arguments)
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").is_file()
