"""How students with added norms lie on disk, so that whoever loads one computes what it computes or refuses.

Stock transformers puts norms before all linear layers (per-projection) or before none. The two of subln it
knows in one architecture, `bitnet`: a Llama with `attn_sub_norm` and `ffn_sub_norm`. A student that is such a
Llama is written as one. Any other gets a model type that nobody but us knows, since transformers would load
it without its norms and without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SUBLN_TYPE = "subln-"  # before the model type of what transformers cannot express
_NAMES = (
    (".self_attn.o_proj.rms_norm.", ".self_attn.attn_sub_norm."),
    (".mlp.down_proj.rms_norm.", ".mlp.ffn_sub_norm."),
)
_ONLY_LLAMA = ("mlp_bias", "pretraining_tp", "sliding_window", "layer_types")


def _is_bitnet_architecture(config: Mapping[str, Any]) -> bool:
    """Whether `bitnet` with these settings is the same function."""
    heads, width = config.get("num_attention_heads", 0), config.get("hidden_size", 0)
    head_dim = config.get("head_dim") or (width // heads if heads else 0)
    return (
        config.get("model_type") in ("llama", "mistral")
        and not any(config.get(name) for name in ("attention_bias", "mlp_bias", "sliding_window"))
        and heads * head_dim == width
    )


def to_saved(config: Mapping[str, Any], conversion: str) -> dict[str, Any]:
    """What config.json says about a student of this configuration."""
    if conversion != "subln":
        return dict(config)
    if _is_bitnet_architecture(config):
        shared = {name: value for name, value in config.items() if name not in _ONLY_LLAMA}
        return shared | {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    names = [f"SubLN{name}" for name in config.get("architectures") or ()]
    return dict(config) | {"model_type": _SUBLN_TYPE + config["model_type"], "architectures": names}


def from_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round: the configuration that the student's code is built from."""
    kind = str(config.get("model_type"))
    if kind == "bitnet":
        return dict(config) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if kind.startswith(_SUBLN_TYPE):
        names = [name.removeprefix("SubLN") for name in config.get("architectures") or ()]
        return dict(config) | {"model_type": kind.removeprefix(_SUBLN_TYPE), "architectures": names}
    return dict(config)


def saved_conversion(config: Mapping[str, Any]) -> str | None:
    """The conversion of the student that a config.json describes; None for one in full precision."""
    entry = config.get("quantization_config")
    if not entry:
        return None
    kind = str(config.get("model_type"))
    if kind == "bitnet" or kind.startswith(_SUBLN_TYPE):
        return "subln"
    return "per-projection" if entry.get("use_rms_norm") else "none"


def to_saved_name(name: str, saved: Mapping[str, Any]) -> str:
    """Of a tensor, in the file beside this config.json."""
    return _renamed(name, _NAMES, saved)


def from_saved_name(name: str, saved: Mapping[str, Any]) -> str:
    """Of a tensor, in the student."""
    return _renamed(name, [(theirs, own) for own, theirs in _NAMES], saved)


def _renamed(name: str, pairs: Iterable[tuple[str, str]], saved: Mapping[str, Any]) -> str:
    if saved.get("model_type") == "bitnet":
        for old, new in pairs:
            name = name.replace(old, new)
    return name
