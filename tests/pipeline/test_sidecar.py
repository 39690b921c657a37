"""Logits, projections and attention maps from the cache alone are those of transformers' own modules."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import featurestore.storage.local
from featurestore.format.schema import HiddenSpec
from featurestore.format.sidecar import Part, Tensor
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from pipeline.errors import RequestError
from pipeline.generate.run import Outcome, execute, prepare
from pipeline.progress import ConsoleReporter
from pipeline.request.generate import GenerateRequest
from pipeline.teacher.checkpoint import load_teacher
from pipeline.teacher.weights import MODEL_TYPES, plan_sidecar
from tests import teachers
from tests.pipeline.sidecar_reference import attention, logits, projections
from tests.stores import lasting
from tests.teachers import text_of

LAYERS, LENGTH = 4, 40
PLAIN: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = PLAIN | {"head_dim": 12}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SMALL, attention_bias=True, rope_theta=500.0),
    "mistral": MistralConfig(**SMALL, sliding_window=7),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": Qwen2Config(**PLAIN, use_sliding_window=False),
    "qwen3": Qwen3Config(
        **(SMALL | {"head_dim": 20}), use_sliding_window=True, sliding_window=9, layer_types=SLIDING
    ),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4),
    "gemma": GemmaConfig(**SMALL),
    "gemma2": Gemma2Config(
        **SMALL,
        sliding_window=6,
        layer_types=SLIDING,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **SMALL, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=20, final_logit_softcapping=3.0
    ),
    "phi3": Phi3Config(
        **PLAIN,
        rope_parameters={"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.5},
        sliding_window=11,
    ),
    "granite": GraniteConfig(
        **PLAIN,
        logits_scaling=7.0,
        attention_multiplier=0.4,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_bias=True,
    ),
    "smollm3": SmolLM3Config(**PLAIN, no_rope_layers=[1, 0, 1, 0]),
}


def save(config: PreTrainedConfig, path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A checkpoint of random weights; norms and biases too, which would else be all ones and zeros."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    model.to(dtype).save_pretrained(path, **how)
    teachers.word_tokenizer(config.vocab_size).save_pretrained(path)
    return path


def generate(teacher: Path, out: Path, **flags: Any) -> Outcome:
    corpus = out.parent / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text_of(LENGTH + n, n)}) for n in range(2)))
    request = GenerateRequest(
        teacher=str(teacher),
        dataset=str(corpus),
        out=str(out),
        engine="transformers",
        dtype="float32",
        max_num_batched_tokens=16,  # each sample alone: batches round the forward pass otherwise
        **flags,
    )
    report = ConsoleReporter(Console(quiet=True))
    return execute(prepare(request, report), report)


def watch(model: Any, layer: int) -> dict[str, torch.Tensor]:
    """What the modules of a block give for Q, K and V before rope, filled by the next forward pass."""
    seen: dict[str, torch.Tensor] = {}
    module = model.get_decoder().layers[layer].self_attn
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "q_norm": "q", "k_norm": "k"}
    for name, ours in names.items():
        if hasattr(module, name):
            # A head's norm comes behind its projection and takes its place.
            getattr(module, name).register_forward_hook(
                lambda _module, _given, out, ours=ours: seen.update({ours: out[0].detach()})
            )
    return seen


def test_every_model_type_is_tried() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_teacher_comes_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    teacher = save(config, tmp_path / "teacher", max_shard_size="40KB" if name == "qwen3" else "5GB")
    layers = (0, LAYERS - 1)
    generate(teacher, tmp_path / "store", top_k=0, final=True, relation_layers=layers, hidden_dtype="f32")
    reader = CacheReader.open(tmp_path / "store")
    sidecar = reader.sidecar()
    assert sidecar.parts == ["head", "block0", "block3"]
    # As the engine does: the default kernel leaves out soft-capping.
    kernel = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation=kernel).eval()
    eager = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
    seen = {layer: watch(model, layer) for layer in layers}
    for index in range(len(reader)):
        sample = reader.read(index)
        states = {spec.layer: f.to_float32() for spec, f in sample.features.items()}  # type: ignore[union-attr]
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        with torch.inference_mode():
            out = model(ids, output_hidden_states=True, use_cache=False)
            maps = eager(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
        for layer, state in states.items():
            assert np.array_equal(state, out.hidden_states[layer][0].numpy()), "another forward pass"
        logits(sidecar.head(), states[LAYERS]).check(out.logits[0].numpy())
        for layer in layers:
            found = projections(sidecar.block(layer), states[layer])
            expected = dict(seen[layer])
            if "qkv" in expected:
                widths = [values.values[0].size for values in found.values()]
                expected = dict(zip(found, expected["qkv"].split(widths, -1), strict=True))
            for which, values in found.items():
                module = expected[which]
                # Gemma 3 has its heads before its positions when it norms them.
                by_head = module.ndim == 3 and len(module) != len(state)
                module = module.transpose(0, 1) if by_head else module
                values.check(module.numpy().reshape(values.values.shape))
            state = maps.hidden_states[layer][0].numpy()
            attention(sidecar.block(layer), state).check(maps.attentions[layer][0].numpy())


def test_bits_are_kept_and_other_tools_read_them(tmp_path: Path) -> None:
    teacher = save(CONFIGS["qwen2"], tmp_path / "teacher", torch.bfloat16)
    generate(teacher, tmp_path / "store", top_k=0, final=True, relation_layers=(2,))
    saved = load_file(teacher / "model.safetensors")
    sidecar = CacheReader.open(tmp_path / "store").sidecar()
    names = {"weight": "lm_head.weight", "norm.weight": "model.norm.weight"}
    check_bits(sidecar.head(), {ours: saved[name] for ours, name in names.items()})
    inside = "model.layers.2."
    projected = {
        f"{n}.{w}": saved[f"{inside}self_attn.{n}_proj.{w}"] for n in "qkv" for w in ("weight", "bias")
    }
    norm = {"input_norm.weight": saved[f"{inside}input_layernorm.weight"]}
    check_bits(sidecar.block(2), projected | norm)
    for part in (sidecar.head(), sidecar.block(2)):
        (file,) = (tmp_path / "store" / "teacher").glob(f"{part.spec.part}-*.safetensors")
        for name, tensor in load_file(file).items():
            assert tensor.dtype == torch.bfloat16
            assert np.array_equal(tensor.view(torch.uint16).numpy(), part.tensors[name].values)


def check_bits(part: Part[Any], expected: dict[str, torch.Tensor]) -> None:
    assert set(part.tensors) == set(expected)
    for name, tensor in part.tensors.items():
        assert tensor.dtype == "bf16" and not tensor.values.flags.writeable
        assert torch.equal(torch.from_numpy(tensor.values.copy()).view(torch.bfloat16), expected[name])
        np.testing.assert_array_equal(tensor.to_float32(), expected[name].float().numpy())


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    teacher = save(CONFIGS["qwen2"], tmp_path / "teacher")
    whole = load_file(teacher / "model.safetensors")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    padded = {name: torch.cat([whole[name], torch.ones(13, 48)]) for name in names}
    save_file(whole | padded, teacher / "model.safetensors", {"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    size = config["vocab_size"]
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": size + 13}))
    (part,) = plan_sidecar(replace(load_teacher(str(teacher)), vocab_size=size), True, ())
    weight: Tensor = part.read()["weight"]
    assert torch.equal(torch.from_numpy(weight.values), whole["lm_head.weight"])
    assert part.size == sum(tensor.values.nbytes for tensor in part.read().values())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"),
            "lacks model.layers.1.self_attn.k_proj",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "quantised to F8",
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.v_proj.weight": torch.ones(3, 48)}),
            "3 x 48 in the checkpoint",
        ),
        (lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight"),
    ],
)
def test_a_checkpoint_that_lacks_what_its_type_has(tmp_path: Path, break_it: Any, message: str) -> None:
    teacher = save(CONFIGS["qwen2"], tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    break_it(weights)
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=message) as refused:
        generate(teacher, tmp_path / "store", final=True, relation_layers=(1,))
    flag = "--final" if "F8" in message else "TEACHER"
    assert flag in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("flags", [{"final": True}, {"relation_layers": (1,)}])
def test_a_type_that_we_do_not_know_is_refused(tmp_path: Path, flags: dict[str, Any]) -> None:
    """OLMo 2 has the tensors of a Llama and norms at other places: by names alone it would pass."""
    from transformers import Olmo2Config

    teacher = save(Olmo2Config(**PLAIN), tmp_path / "teacher")
    with pytest.raises(RequestError, match=f"--{next(iter(flags)).replace('_', '-')}.*olmo2"):
        generate(teacher, tmp_path / "store", **flags)
    assert not (tmp_path / "store").exists()


def files_of(store: Path) -> dict[str, bytes]:
    files = (f for f in store.rglob("*") if f.is_file())
    return lasting({str(f.relative_to(store)): f.read_bytes() for f in files})


def test_parts_are_added_and_nothing_is_written_twice(tmp_path: Path) -> None:
    teacher, store = save(CONFIGS["qwen3"], tmp_path / "teacher"), tmp_path / "store"
    kept: list[dict[str, bytes]] = [{}]

    def step(**flags: Any) -> tuple[Outcome, set[str]]:
        """What a request gives, and the new files; none that was there has changed or gone."""
        outcome = generate(teacher, store, top_k=4, **flags)
        kept.append(files_of(store))
        assert kept[-2].items() <= kept[-1].items()
        assert CacheReader.open(store).manifest_digest == outcome.manifest
        return outcome, kept[-1].keys() - kept[-2].keys()

    plain, _ = step(hidden_layers=(1,))
    assert CacheReader.open(store).sidecar().parts == []

    final, new = step(hidden_layers=(1,), final=True)
    assert (final.tokens, final.sidecar_size) == (plain.tokens, sum_of(new, kept[-1], "head"))
    assert groups_of(new) == {f"hidden.L{LAYERS}"}

    # The state that enters block 1 is there: only its weights are new.
    block, new = step(final=True, relation_layers=(1,))
    assert (block.tokens, block.sidecar_size) == (0, sum_of(new, kept[-1], "block1")) and not groups_of(new)

    more, new = step(final=True, hidden_layers=(LAYERS,), relation_layers=(3, 1))
    assert (more.tokens, more.sidecar_size) == (plain.tokens, sum_of(new, kept[-1], "block3"))
    assert groups_of(new) == {"hidden.L3"}
    again, new = step(final=True, relation_layers=(1, 3))
    assert (again.tokens, again.sidecar_size, new) == (0, 0, set())
    assert again.manifest == more.manifest

    assert CacheReader.open(store).sidecar().parts == ["head", "block1", "block3"]
    old = CacheReader.open(store, final.manifest)
    assert old.sidecar().parts == ["head"]
    assert len(old.read(0, [HiddenSpec(LAYERS)]).tokens) == int(old.lengths[0])
    shutil.rmtree(teacher)
    assert old.sidecar().head().spec.vocab_size == SMALL["vocab_size"]


def sum_of(new: set[str], files: dict[str, bytes], part: str) -> int:
    """Bytes of the one sidecar file among the new ones, which is that of `part`."""
    (file,) = (name for name in new if name.endswith(".safetensors"))
    assert file.startswith(f"teacher/{part}-")
    return len(files[file])


def groups_of(new: set[str]) -> set[str]:
    return {name.split("/")[1].split("-")[0] for name in new if name.startswith("commit/")}


def test_a_part_that_is_gone_is_put_back(tmp_path: Path) -> None:
    teacher, store = save(CONFIGS["llama"], tmp_path / "teacher"), tmp_path / "store"
    generate(teacher, store, final=True)
    before = files_of(store)
    (head,) = (store / "teacher").glob("head-*")
    head.unlink()
    generate(teacher, store, final=True)
    assert {n: b for n, b in files_of(store).items() if not n.startswith("provenance/")} == {
        n: b for n, b in before.items() if not n.startswith("provenance/")
    }


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_killed_and_completed(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops dead at any publication is completed by the same run, with the same parts."""
    teacher, store, calls = save(CONFIGS["llama"], tmp_path / "teacher"), tmp_path / "store", 0
    flags: dict[str, Any] = {"top_k": 0, "final": True, "relation_layers": (2,)}
    real = featurestore.storage.local.publish

    def dies(path: Path, data: bytes) -> bool:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(featurestore.storage.local, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            generate(teacher, store, **flags)
    generate(teacher, store, **flags)
    sidecar = CacheReader.open(store).sidecar()
    assert sidecar.parts == ["head", "block2"]
    assert sidecar.head().spec.hidden_size == sidecar.block(2).spec.hidden_size == SMALL["hidden_size"]
    assert verify_store(store, deep=True).sound
    assert len(list((store / "teacher").glob("*.safetensors"))) == 2
