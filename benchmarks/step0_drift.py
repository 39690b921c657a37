"""How far conversion to BitNet moves a student before its first step, and which weights of new norms move it
least.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from common import RUN, table, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from student import bitnet
from student.bitnet.calibration import distance, final_states
from student.modeling.shape import choose_layers

LENGTH, CALIBRATED, MEASURED = 128, 8, 4  # tokens per sample, samples
STAGES = (bitnet.Strengths(0, 0, 1), bitnet.Strengths(0, 1, 1), bitnet.FULL)

# Of x [T, I], r [T, 1] and n = x / r.
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]
ALTERNATIVES: dict[str, Weights] = {
    "1": lambda x, r, n: torch.ones(x.shape[1]),
    "one number: mean r (least squares)": lambda x, r, n: r.mean().expand(x.shape[1]),
    "one number: median r": lambda x, r, n: r.median().expand(x.shape[1]),
    "one number: geometric mean r": lambda x, r, n: r.log().mean().exp().expand(x.shape[1]),
    "per channel: least squares": lambda x, r, n: (x * n).sum(0) / n.square().sum(0),
    "per channel: geometric mean r weighted by \\|n\\|": lambda x, r, n: (
        (n.abs() * r.log()).sum(0) / n.abs().sum(0)
    ).exp(),
}


def samples(count: int) -> list[Tensor]:
    """The beginnings of the first texts of the demo that are long enough."""
    tokenizer = AutoTokenizer.from_pretrained(RUN / "teacher")
    with (RUN / "topics.jsonl").open() as lines:
        encoded = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    return [torch.tensor(ids[:LENGTH]) for ids in encoded if len(ids) >= LENGTH][:count]


def start(layers: int) -> Any:
    """The teacher's evenly spread layers in full precision."""
    model = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.float32).eval()
    body = model.get_decoder()
    chosen = choose_layers("uniform", layers, len(body.layers))
    body.layers = torch.nn.ModuleList([body.layers[index] for index in chosen])
    model.config.num_hidden_layers = layers
    return model


def inputs(plain: Any, names: set[str], tokens: list[Tensor]) -> dict[str, Tensor]:
    """What goes into these projections, [T, I] each."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    layers = plain.get_decoder().layers
    hooks = [
        layers.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: kept[name].append(args[0][0])
        )
        for name in names
    ]
    final_states(plain, tokens)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


@torch.no_grad()
def with_weights(plain: Any, conversion: str, activations: dict[str, Tensor], weights: Weights) -> Any:
    """A converted copy whose norms have these weights."""
    student, eps = copy.deepcopy(plain), bitnet.norm_epsilon(plain.config)
    bitnet.convert_student(student, conversion)
    for name, x in activations.items():
        r = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        student.get_decoder().layers.get_submodule(name).rms_norm.weight.copy_(weights(x, r, x / r))
    return student


def variants(plain: Any, conversion: str, calibration: list[Tensor]) -> dict[str, Any]:
    """Converted students by what the weights of their norms are."""
    ours = copy.deepcopy(plain)
    # Every other sample is measured on, which is of no interest here.
    bitnet.convert_calibrated(ours, conversion, [part for one in calibration for part in (one, one)])
    if conversion == "none":
        return {"-": ours}
    activations = inputs(plain, bitnet.normed(plain.get_decoder().layers, conversion), calibration)
    others = {
        name: with_weights(plain, conversion, activations, weights)
        for name, weights in ALTERNATIVES.items()
        if name == "1" or conversion == "subln"
    }
    return {**others, "**per channel: geometric mean r weighted by n²** (what the command does)": ours}


def main() -> None:
    rows = []
    tokens = samples(CALIBRATED + MEASURED)
    for layers in (12, 30):
        plain = start(layers)
        before = final_states(plain, tokens[CALIBRATED:])
        for conversion in bitnet.CONVERSIONS:
            for name, student in variants(plain, conversion, tokens[:CALIBRATED]).items():
                after = [final_states(student, tokens[CALIBRATED:], stage) for stage in STAGES]
                moved = [f"{distance(before, one):.3f}" for one in after]
                rows.append([str(layers), conversion, name, *moved])
                print(" | ".join(rows[-1]), flush=True)
    header = ["layers", "conversion", "weights of the norms", "norms alone", "+ int8", "+ ternary weights"]
    body = (
        "Relative change of final hidden states, ||after - before|| / ||before||, over "
        f"{MEASURED} samples of {LENGTH} tokens of the demo text; norms calibrated on {CALIBRATED} others. "
        "r is the root mean square of a token's activations.\n\n"
        f"{table(header, rows)}"
    )
    write_result("step0_drift", "What conversion to BitNet changes before the first step", body)


if __name__ == "__main__":
    main()
