"""What GGUF's readers need to know of an architecture: its name there, its tensors, its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from student.errors import UserError
from student.export.norms import norm_epsilons, norm_mode
from student.export.source import ExportSource

# model_type in transformers -> architecture in GGUF.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def architecture(source: ExportSource) -> str:
    """The name in GGUF; UserError for a student that llama.cpp would run differently or not at all."""
    config, where = source.config, source.directory
    name = ARCHITECTURES.get(config["model_type"])
    if name is None:
        raise UserError(
            f"{where}: no GGUF export for {config['model_type']} students; there is one for "
            f"{', '.join(ARCHITECTURES)}; --format hf-bitnet takes any"
        )
    rope = source.model.config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{where}: no GGUF export for rope type {rope['rope_type']}; --format hf-bitnet has it"
        )
    window = getattr(source.model.config, "sliding_window", None)
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(
            f"{where}: llama.cpp has no sliding window for {config['model_type']} ({window} of "
            f"{config['max_position_embeddings']} positions); set sliding_window to null or "
            "max_position_embeddings to the window in --student-model-config"
        )
    mode = norm_mode(source)
    if mode == "none":
        return name
    if mode != "subln" or not _fits_bitnet(source):
        raise UserError(
            f"{where}: llama.cpp has norms before projections only in its bitnet architecture: SubLN on a "
            "student of Llama's shape with tied embeddings, one epsilon and no biases; --format hf-bitnet "
            "has more"
        )
    return "bitnet"


def _fits_bitnet(source: ExportSource) -> bool:
    config = source.config
    return (
        config["model_type"] == "llama"
        and bool(config["tie_word_embeddings"])
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
        and head_size(config) * config["num_attention_heads"] == config["hidden_size"]
        and norm_epsilons(source) == {config["rms_norm_eps"]}
    )


def head_size(config: dict[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_settings(writer: Any, source: ExportSource, name: str) -> None:
    """The hyperparameters, under GGUF's keys."""
    config = source.config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(source.model.config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config["vocab_size"])
    if name == "bitnet":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(1.0)


def tensors(source: ExportSource, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """(name in GGUF, name here, tensor) of everything that is not a ternary matrix or its scale."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, source.config["num_hidden_layers"])
    seen: set[int] = set()
    for own, tensor in source.model.state_dict().items():
        if tensor.data_ptr() in seen or own.endswith(".weight_scale"):
            continue
        seen.add(tensor.data_ptr())
        theirs = names.get_name(_plain_name(own), try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"{source.directory}: GGUF's {name} has no place for the tensor {own}")
        yield theirs, own, tensor


def _plain_name(own: str) -> str:
    """Norms before projections, under the names that GGUF knows them by."""
    return own.replace("self_attn.o_proj.rms_norm.", "self_attn.inner_attn_ln.").replace(
        "mlp.down_proj.rms_norm.", "mlp.ffn_layernorm."
    )


def reorder(tensor: Tensor, own: str, config: dict[str, Any], name: str) -> Tensor:
    """Rows of queries and keys in the order that GGUF's llama has: rotary pairs side by side in a head."""
    return _reorder(tensor, own, config, name, to_pairs=True)


def restore(tensor: Tensor, own: str, config: dict[str, Any], name: str) -> Tensor:
    """The inverse of `reorder`."""
    return _reorder(tensor, own, config, name, to_pairs=False)


def _reorder(tensor: Tensor, own: str, config: dict[str, Any], name: str, to_pairs: bool) -> Tensor:
    if name != "llama" or not any(part in own for part in (".q_proj.", ".k_proj.")):
        return tensor
    heads = config["num_attention_heads" if ".q_proj." in own else "num_key_value_heads"]
    half = tensor.shape[0] // heads // 2
    parts = (2, half) if to_pairs else (half, 2)
    return tensor.reshape(heads, *parts, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()
