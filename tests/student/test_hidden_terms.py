"""Hidden and structure terms in whole trainings: other widths, projectors, mappers, resuming, packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, Collator
from student.losses import structure
from student.losses.catalogue import Need, catalogue
from student.objective.files import read_objective
from student.objective.projectors import ProjectorSpec
from student.objective.terms import Objective, term
from student.training.model import DistillationModel
from student.training.plan import plan_data, plan_split
from student.training.trainer import CacheTrainer
from tests.student.conftest import SPECS

Train = Callable[..., dict[str, Any]]
Run = Callable[..., tuple[int, str, str]]
NARROW = (
    "--student-model-config",
    '{"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}',
    "--init",
    "random",
)
COMPARING = [
    loss.name
    for loss in catalogue().values()
    if loss.kind in ("hidden", "structure") and Need.FULL not in loss.needs
]


def narrow_student(teacher: Path) -> Any:
    config = LlamaConfig.from_pretrained(teacher)
    config.hidden_size, config.head_dim, config.num_hidden_layers = 32, 16, 2
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", COMPARING)
def test_a_term_compares_projected_states_of_its_layers(name: str, teacher: Path, cache: Path) -> None:
    """Against transformers' own hidden states, one sample after the other."""
    dataset = CachedDataset(CacheReader.open(cache), range(5), SPECS)
    batch = Collator(SPECS, 2)([dataset[index] for index in range(5)])
    loss = catalogue()[name]
    following = (3, 2) if loss.flow else None
    one = term(name, 1.5, (1, 1), following, ProjectorSpec("mlp", 32, 64))
    model = DistillationModel(narrow_student(teacher), Objective.of([one])).train()
    output = model(**batch)
    output["loss"].backward()
    for parameter in model.projectors.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
    states = model.student(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    projectors = list(model.projectors.values())
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        learned = labels != IGNORE
        own = [projectors[i](states[i + 1][row, learned]) for i in range(len(projectors))]
        theirs = [batch["coded_hidden"][layer]["values"][row, learned].float() for layer in (1, 3)]
        if loss.kind == "hidden":
            values = loss.function(own[0], theirs[0])
        elif loss.flow:
            values = structure.fsp((own[0], own[1]), (theirs[0], theirs[1]), [int(learned.sum())])
        else:
            values = loss.function(own[0], theirs[0], [int(learned.sum())])
        total, count = total + values.double().sum().item(), count + int(learned.sum())
    assert output["loss"].item() == pytest.approx(1.5 * total / count, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in COMPARING if catalogue()[name].any_width])
def test_relations_need_no_projector(name: str, teacher: Path, cache: Path) -> None:
    dataset = CachedDataset(CacheReader.open(cache), range(5), SPECS)
    batch = Collator(SPECS, 2)([dataset[index] for index in range(5)])
    model = DistillationModel(narrow_student(teacher), Objective.of([term(name, 1.0, (1, 1))])).train()
    model(**batch)["loss"].backward()
    gradient = model.student.get_decoder().layers[0].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.any()


PROJECTED = {
    "terms": [
        {"loss": "kl"},
        {"loss": "hidden_mse", "weight": 0.5, "layers": [1, 3], "projector": "linear"},
        {"loss": "hidden_cosine", "mapper": "last", "projector": "orthogonal"},
        {"loss": "hidden_similarity", "weight": 2.0, "mapper": "uniform"},
    ]
}


def test_projectors_resume_bit_for_bit_and_stay_out_of_the_student(train: Train, tmp_path: Path) -> None:
    (tmp_path / "objective.yaml").write_text(json.dumps(PROJECTED))
    arguments = (*NARROW, "--objective", tmp_path / "objective.yaml", "--weight-decay", 0.1, "--pack-rows")
    arguments += ("--max_steps", 6, "--save_steps", 3, "--save_total_limit", 5)
    summary = train(tmp_path / "straight", *arguments)
    train(tmp_path / "again", *arguments, "--resume_from_checkpoint", tmp_path / "straight" / "checkpoint-3")
    for file in ("model.safetensors", "projectors.safetensors"):
        straight, again, halfway = (
            load_file(tmp_path / run / checkpoint / file)
            for run, checkpoint in (
                ("straight", "checkpoint-6"),
                ("again", "checkpoint-6"),
                ("straight", "checkpoint-3"),
            )
        )
        assert all(torch.equal(tensor, again[name]) for name, tensor in straight.items())
        assert any(not torch.equal(tensor, halfway[name]) for name, tensor in straight.items())
    specs = json.loads((tmp_path / "straight" / "checkpoint-6" / "projectors.json").read_text())
    assert len(specs) == 3 and {spec["kind"] for spec in specs.values()} == {"linear", "orthogonal"}
    assert not list((tmp_path / "straight").glob("projectors*"))
    student, info = AutoModelForCausalLM.from_pretrained(tmp_path / "straight", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert summary["sizes"]["student_parameters"] == sum(p.numel() for p in student.parameters())
    file = tmp_path / "straight" / "model.safetensors"
    assert summary["sizes"]["checkpoint_bytes"] == file.stat().st_size


def test_a_run_does_not_go_on_with_other_projectors(
    train: Train, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    arguments = (*NARROW, "--hidden-loss", "mse", "--max_steps", 2, "--save_steps", 1, "--projector")
    train(tmp_path / "one", *arguments, "linear")
    on = ("--resume_from_checkpoint", tmp_path / "one" / "checkpoint-1", "--report-to", "none")
    on += ("--eval-fraction", 0.25, "--per-device-train-batch-size", 4)
    code, _, err = distily_train(cache, "--output-dir", tmp_path / "two", *arguments, "mlp", *on)
    assert code == 2, err
    assert "--resume-from-checkpoint" in err.splitlines()[-1] and "linear" in err.splitlines()[-1]


def test_weight_decay_leaves_orthogonal_projectors_alone(teacher: Path, cache: Path, tmp_path: Path) -> None:
    terms = [
        term("hidden_mse", 1.0, (1, 1), projector=ProjectorSpec(kind, 32, 64))
        for kind in ("linear", "mlp", "orthogonal")
    ]
    model = DistillationModel(narrow_student(teacher), Objective.of(terms))
    reader = CacheReader.open(cache)
    data = plan_data(model.objective, reader, plan_split(reader, 0.0))
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = CacheTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=None,
        vocab_size=199,
        tokenizer_dir=teacher,
    )
    decayed = [name for name in trainer.get_decay_parameter_names(model) if name.startswith("projectors.")]
    names = [name for name, _ in model.named_parameters() if name.startswith("projectors.")]
    assert len(decayed) == 3 and len(names) == 6
    assert not [name for name in decayed if "bias" in name or "parametrizations" in name]


def test_packed_and_accumulated_steps_are_those_of_one_padded_batch(train: Train, tmp_path: Path) -> None:
    """The mean is over learned positions of the whole batch, however it is cut and packed."""
    step = ("--student-model-config", '{"num_hidden_layers": 2}', "--max_steps", 1, "--optim", "sgd")
    step += ("--learning-rate", 1, "--warmup_steps", 0, "--max_grad_norm", 0)
    step += ("--hidden-loss", "similarity", "--hidden-weight", 5, "--mapper", "last-2")
    train(tmp_path / "one", *step, "--per-device-train-batch-size", 12)
    cut = ("--per-device-train-batch-size", 6, "--gradient-accumulation-steps", 2, "--pack-rows")
    train(tmp_path / "packed", *step, *cut)
    one, packed = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "packed"))
    for name, tensor in one.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*NARROW, "--hidden-loss", "mse"], ["32 wide and the teacher 64", "--projector linear"]),
        ([*NARROW, "--hidden-loss", "fsp"], ["32 wide and the teacher 64", "--projector linear"]),
        (["--hidden-loss", "fsp", "--layer-map", "1:1"], ["--layer-map", "two pairs"]),
        (["--hidden-loss", "cosin"], ["--hidden-loss", "did you mean cosine?"]),
        (["--hidden-loss", "mse", "--mapper", "first"], ["--mapper", "uniform+last"]),
        (["--hidden-loss", "mse", "--mapper", "last-3"], ["last-3", "2 cached layers"]),
        (["--hidden-loss", "mse", "--mapper", "last", "--layer-map", "1:1"], ["--mapper", "--layer-map"]),
        (["--hidden-loss", "mse", "--projector", "square"], ["--projector", "orthogonal"]),
        (["--projector", "linear"], ["--projector", "--hidden-loss"]),
        (["--mapper", "last"], ["--mapper", "--hidden-loss"]),
    ],
)
def test_bad_requests(
    arguments: list[str], words: list[str], distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"projector": "square"}, "projector must be one of identity"),
        ({"mapper": "first"}, "choose all, last"),
        ({"mapper": 3}, "mapper must be one of"),
        ({"mapper": "last", "layer_map": {1: 1}}, "layer_map excludes"),
    ],
)
def test_bad_objective_files(
    entry: dict[str, Any], word: str, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "objective.yaml"
    file.write_text(yaml.safe_dump({"terms": [{"loss": "hidden_mse", **entry}]}))
    code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", "--objective", file)
    assert code == 2 and "terms[0] (hidden_mse)" in err and word in err, err


def test_the_documented_triple_loss_is_a_valid_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hidden-states.md").read_text()
    (tmp_path / "objective.yaml").write_text(page.split("```yaml")[1].split("```")[0])
    terms = read_objective(str(tmp_path / "objective.yaml")).terms
    assert [(one.loss.name, one.weight.start) for one in terms] == [
        ("kl", 5),
        ("ce", 2),
        ("hidden_cosine", 1),
    ]
    assert terms[2].mapper == "last" and terms[2].projector == "linear"
