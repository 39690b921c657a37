"""Where norms go in each architecture, and that calibration keeps the student's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from student import bitnet
from student.errors import UserError
from student.modeling.saving import new_student
from tests.student.test_ternary_layers import llama, samples

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tiny(kind: str, **settings: Any) -> Any:
    return AutoConfig.for_model(kind, **TINY, **settings)


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        *((kind, "self_attn.o_proj", "mlp.down_proj") for kind in ("llama", "mistral", "qwen2", "qwen3")),
        *((kind, "self_attn.o_proj", "mlp.down_proj") for kind in ("gemma", "gemma2", "gemma3_text")),
        *((kind, "self_attn.o_proj", "mlp.down_proj") for kind in ("phi3", "smollm3", "granite")),
        ("phi", "self_attn.dense", "mlp.fc2"),
        ("starcoder2", "self_attn.o_proj", "mlp.c_proj"),
    ],
)
def test_subln_finds_its_projections(kind: str, attention: str, mlp: str) -> None:
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(tiny(kind)).get_decoder().layers
    chosen = {f"{layer}.{name}" for layer in range(2) for name in (attention, mlp)}
    assert bitnet.normed(layers, "subln") == chosen
    assert len(bitnet.normed(layers, "per-projection")) == bitnet.convert(layers)


def test_subln_refuses_experts() -> None:
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(tiny("mixtral")).get_decoder().layers
    with pytest.raises(UserError, match="--bitnet-conversion subln: layer 0 has 0 linear layers called"):
        bitnet.normed(layers, "subln")


@pytest.mark.parametrize("conversion", ["subln", "per-projection"])
def test_weights_are_geometric_means_of_sizes(conversion: str) -> None:
    plain, student = llama().eval(), llama().eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in plain.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0].double())
            )
    with torch.no_grad():
        plain(samples()[0][None])  # the other one is measured on
    bitnet.convert_calibrated(student, conversion, samples())
    assert not student.training
    compared = 0
    for name, layer in bitnet.bit_linears(student):
        if layer.rms_norm is None:
            continue
        x_TI = torch.cat(inputs[name])
        r_T1 = (x_TI.square().mean(-1, keepdim=True) + student.config.rms_norm_eps).sqrt()
        share_TI = (x_TI / r_T1).square() / (x_TI / r_T1).square().sum(0)
        best = (r_T1**share_TI).prod(0)
        torch.testing.assert_close(layer.rms_norm.weight.double(), best, rtol=1e-4, atol=1e-7)
        compared += 1
    assert compared == (4 if conversion == "subln" else 14)


def test_the_drift_is_that_of_the_final_states() -> None:
    """Norms with weights of one would move them far more than calibrated ones do."""
    plain, student, crude = (llama().eval() for _ in range(3))
    with torch.no_grad():
        for model in (plain, student, crude):
            for name, module in model.named_modules():
                if name.endswith(("v_proj", "up_proj")):  # so that what the norms divide by is small
                    module.weight *= 0.1
    drift = bitnet.convert_calibrated(student, "subln", samples())
    bitnet.convert_student(crude, "subln")
    for _, layer in bitnet.bit_linears(crude):
        layer.strengths = bitnet.Strengths(0, 0, 1)
        layer.train()

    def distance(model: Any) -> float:
        with torch.no_grad():
            one, other = (which.model(samples()[1][None]).last_hidden_state for which in (plain, model))
        return float((one - other).norm() / one.norm())

    assert drift.quantised == pytest.approx(distance(student), rel=1e-4)
    assert drift.norms is not None
    assert drift.norms < 0.5 * distance(crude)


def test_without_norms_there_is_one_drift() -> None:
    drift = bitnet.convert_calibrated(llama(), "none", samples())
    assert drift.norms is None
    assert 0 < drift.quantised < 2


@torch.no_grad()
def test_soft_capped_scores_are_capped() -> None:
    """SDPA would leave the cap out."""

    def config() -> Any:
        return tiny("gemma2", head_dim=16, attn_logit_softcapping=0.05, initializer_range=0.5)

    student = new_student(config()).eval()
    logits = {}
    for attention in ("eager", "sdpa"):
        other = AutoModelForCausalLM.from_config(config(), attn_implementation=attention).eval()
        other.load_state_dict(student.state_dict())
        logits[attention] = other(samples()[1][None]).logits
    ours = student(samples()[1][None]).logits
    assert torch.equal(ours, logits["eager"])
    assert (ours - logits["sdpa"]).norm() > 1e-3 * ours.norm()
