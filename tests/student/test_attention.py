"""Recomputed queries, keys, values and attention against what transformers' own modules compute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

from student.losses.blocks import StudentBlock, TeacherBlock
from student.losses.relations import attention_output
from tests import teachers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}


def llama(**changes: Any) -> Any:
    return model_of(LlamaConfig(**SIZES, **changes))


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def gemma3(tmp_path: Path) -> Any:
    path = teachers.gemma3(tmp_path, vocab_size=97)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


MODELS = {
    "llama": lambda _: llama(),
    "llama with biases and scaled rope": lambda _: llama(attention_bias=True, rope_parameters=SCALED),
    "qwen3": lambda _: model_of(Qwen3Config(**SIZES, head_dim=24)),
    "phi3": lambda _: model_of(
        Phi3Config(
            **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        )
    ),
    "gemma3": gemma3,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param](tmp_path)
    with torch.no_grad():
        for parameter in made.parameters():  # norms of ones and biases of zeros would hide themselves
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def watch(model: Any, layer: int) -> dict[str, Any]:
    """What goes through a block: its input, rotation, head outputs before o_proj, attention weights."""
    # Longer than Gemma 3's window in tests.teachers.
    ids = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(1))
    block, found = model.get_decoder().layers[layer], {}

    def before(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["input"], found["rotation"] = args[0], kwargs["position_embeddings"]

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: found.update(output=args[0])),
        block.self_attn.register_forward_hook(lambda _m, _a, out: found.update(weights=out[1])),
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def check(found: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, block: Any) -> None:
    output = attention_output(query, key, value, block.scoring.scale, block.window)
    torch.testing.assert_close(output, found["output"], rtol=1e-4, atol=1e-5)
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    z = torch.einsum("bthd,bshd->bhts", query, key.repeat_interleave(groups, 2)) * block.scoring.scale
    weights = found["weights"]
    seen = weights > 0
    assert seen.tril().sum() == seen.sum()
    assert block.window is None or (seen.sum(-1) <= block.window).all()
    z = z.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(z.softmax(-1), weights, rtol=1e-4, atol=1e-5)
    assert weights.shape[-1] == length


@pytest.mark.parametrize("layer", [0, 1])
def test_the_students_block_gives_what_its_attention_computes(model: Any, layer: int) -> None:
    found, block = watch(model, layer), StudentBlock(model.get_decoder().layers[layer])
    with torch.no_grad():
        parts = block.project(found["input"])
        query, key = block.rotate(parts, found["rotation"])
    check(found, query, key, parts.value, block)


def sidecar(model: Any, layer: int) -> tuple[Any, dict[str, Tensor]]:
    """What `featurestore.format.sidecar.BlockSpec` says of a block, and its weights, straight from it."""
    config, block = model.config, model.get_decoder().layers[layer]
    attention = block.self_attn
    d, heads, groups = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
    one = 1.0 if config.model_type.startswith("gemma") else 0.0
    kinds = getattr(config, "layer_types", None) or [None] * (layer + 1)
    rope = config.rope_parameters
    window = getattr(attention, "sliding_window", None)
    spec = SimpleNamespace(
        layer=layer,
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=groups,
        head_dim=d,
        norm_eps=config.rms_norm_eps,
        attention_scale=attention.scaling,
        attention_softcap=None,
        window=window,
        rope=dict(rope.get(kinds[layer], rope)),
    )
    weights = {"input_norm.weight": block.input_layernorm.weight + one}
    if hasattr(attention, "qkv_proj"):
        parts = attention.qkv_proj.weight.split([heads * d, groups * d, groups * d])
        weights |= {f"{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    else:
        for name in "qkv":
            linear = getattr(attention, f"{name}_proj")
            weights |= {f"{name}.{key}": value for key, value in linear.named_parameters()}
    if hasattr(attention, "q_norm"):
        weights |= {f"{n}.weight": getattr(attention, n).weight + one for n in ("q_norm", "k_norm")}
    return spec, {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("layer", [0, 1])
def test_the_teachers_block_gives_what_its_attention_computes(model: Any, layer: int) -> None:
    found = watch(model, layer)
    block = TeacherBlock(*sidecar(model, layer), max_position=model.config.max_position_embeddings)
    parts = block.project(found["input"])
    query, key = block.rotate(parts)
    check(found, query, key, parts.value, block)
    assert not block.state_dict()
    assert not list(block.parameters())


def test_a_block_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="input_layernorm"):
        StudentBlock(torch.nn.Linear(3, 3))
