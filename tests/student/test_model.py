"""DistillationModel against transformers' own forward pass: logits, hidden states, losses, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaConfig

from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, Collator
from student.data.decoding import decode_targets
from student.objective.terms import Objective, term
from student.training.model import EVAL_COLUMNS, DistillationModel
from tests import teachers
from tests.student.conftest import SPECS

OBJECTIVE = Objective.of(
    [
        term("kl", 0.5),
        term("ce", 0.25),
        term("hidden_mse", 2.0, (1, 1)),
        term("hidden_cosine", 3.0, (3, 3)),
        term("hidden_mse", 1.5, (1, 0)),
    ]
)


@pytest.fixture
def batch(cache: Path) -> dict[str, Any]:
    dataset = CachedDataset(CacheReader.open(cache), range(5), SPECS)
    return Collator(SPECS, 2)([dataset[index] for index in range(5)])


def other_student(teacher: Path) -> Any:
    """The tiny teacher's shape with other random weights."""
    config = LlamaConfig.from_pretrained(teacher)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def plain_terms(student: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Every term of OBJECTIVE per learned position, from the padded model's full logits and all
    hidden states.
    """
    output = student(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    )
    learned = batch["labels"] != IGNORE
    log_q = output.logits[learned].double().log_softmax(-1)
    coded = {name: part[learned] for name, part in batch["coded_head"].items()}
    targets = decode_targets(coded, batch["labels"][learned])
    ids, log_p = targets.ids_NK, targets.logprob_NK.double()
    head_q = log_q.gather(1, ids)
    tail_p, tail_q = 1 - log_p.exp().sum(-1), 1 - head_q.exp().sum(-1)
    kl = (log_p.exp() * (log_p - head_q)).sum(-1) + tail_p * (tail_p / tail_q).log()
    ce = -log_q.gather(1, batch["labels"][learned][:, None])[:, 0]
    states = [state[learned] for state in output.hidden_states]
    goals = {layer: part["values"][learned].float() for layer, part in batch["coded_hidden"].items()}
    return [
        kl,
        ce,
        (states[1] - goals[1]).square().mean(-1),
        1 - nn.functional.cosine_similarity(states[3], goals[3], dim=-1),
        (states[0] - goals[1]).square().mean(-1),
    ]


def test_loss_and_terms_are_those_of_a_plain_forward_pass(teacher: Path, batch: dict[str, Any]) -> None:
    student = other_student(teacher)
    terms = plain_terms(student, batch)
    output = DistillationModel(student, OBJECTIVE).train()(**batch, num_items_in_batch=torch.tensor(50))
    wanted = torch.stack([term.double().sum() / 50 for term in terms])
    torch.testing.assert_close(output["terms"].double(), wanted, rtol=1e-4, atol=1e-5)
    weighted = wanted @ torch.tensor(OBJECTIVE.weights_at(0.0), dtype=torch.float64)
    assert output["loss"].item() == pytest.approx(weighted.item(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_are_those_of_a_plain_forward_pass(
    checkpointing: bool | None, teacher: Path, batch: dict[str, Any]
) -> None:
    """Also with gradient checkpointing of either kind (True: reentrant), where layers run a second time."""
    student = other_student(teacher)
    terms = plain_terms(student, batch)
    count = len(terms[0])
    sum(w * t.sum() / count for w, t in zip(OBJECTIVE.weights_at(0.0), terms, strict=True)).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    model = DistillationModel(student, OBJECTIVE).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model(**batch)["loss"].backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_evaluation_sums_by_sequence(teacher: Path, batch: dict[str, Any]) -> None:
    student = other_student(teacher)
    with torch.no_grad():
        terms = plain_terms(student, batch)
        sums = DistillationModel(student, OBJECTIVE).eval()(**batch)["sums"]
    assert sums.shape == (5, len(EVAL_COLUMNS))
    got = dict(zip(EVAL_COLUMNS, sums.sum(0).tolist(), strict=True))
    assert got["kl"] == pytest.approx(terms[0].sum().item(), rel=1e-4)
    assert got["ce"] == pytest.approx(terms[1].sum().item(), rel=1e-4)
    assert sums[:, 5].tolist() == (batch["labels"] != IGNORE).sum(1).tolist()
    codes = batch["coded_head"]["label_logprob"][batch["labels"] != IGNORE]
    teacher_nll = codes.sum().item() / 64
    assert got["teacher_nll"] == pytest.approx(teacher_nll, rel=1e-5)


def test_the_teacher_itself_scores_zero(teacher: Path, batch: dict[str, Any]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    objective = Objective.of([term("kl", 1.0), term("hidden_mse", 1.0, (3, 3))])
    with torch.no_grad():
        sums = DistillationModel(teacher, objective).eval()(**batch)["sums"].sum(0)
    # The store rounds head logits to 1/32 nat: an error of at most 1/64, so a KL of at most about (1/64)^2 /
    # 2 each.
    positions = sums[EVAL_COLUMNS.index("positions")].item()
    assert 0 <= sums[EVAL_COLUMNS.index("kl")].item() < positions / 64**2
    assert 0 <= sums[EVAL_COLUMNS.index("loss")].item() < positions / 64**2
    assert sums[EVAL_COLUMNS.index("top1_agreement")] == sums[EVAL_COLUMNS.index("positions")]


def small(config_class: Any, **settings: Any) -> Any:
    config = config_class(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["cohere", "granite", "gemma3", "qwen3"])
def test_scale_and_softcap_of_the_architecture(
    architecture: str, tmp_path: Path, batch: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    if architecture in ("gemma3", "qwen3"):
        path = getattr(teachers, architecture)(tmp_path, vocab_size=199)
        student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        student = {
            "cohere": lambda: small(CohereConfig, logit_scale=0.25),
            "granite": lambda: small(GraniteConfig, logits_scaling=8.0),
        }[architecture]()
        with torch.no_grad():
            student.get_input_embeddings().weight.mul_(20.0)
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    loss = DistillationModel(student, Objective.of([term("ce", 1.0)])).train()(**inputs)["loss"]
    learned = batch["labels"] != IGNORE
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[learned]
    wanted = nn.functional.cross_entropy(logits.double(), batch["labels"][learned])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_autocast_runs_body_and_head_in_bfloat16(teacher: Path, batch: dict[str, Any]) -> None:
    student = other_student(teacher)
    model = DistillationModel(student, Objective.of([term("kl", 1.0)])).train()
    exact = model(**batch)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**batch)["loss"]
    assert low.dtype == torch.float32
    assert low.item() != exact
    assert low.item() == pytest.approx(exact, rel=2**-7)


def test_a_batch_without_learned_positions_is_zero(teacher: Path, batch: dict[str, Any]) -> None:
    batch["labels"].fill_(IGNORE)
    model = DistillationModel(other_student(teacher), OBJECTIVE).train()
    loss = model(**batch, num_items_in_batch=torch.tensor(0))["loss"]
    loss.backward()
    assert loss.item() == 0.0
