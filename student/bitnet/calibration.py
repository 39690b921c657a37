"""What conversion does to the function of a student before it is trained: weights of new norms that keep it
nearly as it was, and how far it moved.

The norm divides a token's activations x by r = sqrt(mean x^2 + eps), so its weights have to give the usual
size back. Weight c is the geometric mean of r over the tokens of some samples, each weighted by n_c^2, where
n = x / r. Channels that few tokens use, such as those of attention sinks, thus get the size that they have in
these tokens, and large tokens do not raise the weights of all other channels, as they would in an arithmetic
mean. benchmarks/step0_drift.py compares other choices.

Shape letters: T positions, D hidden size, I input features of a projection.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.bitnet.convert import convert, convert_student, norm_epsilon, normed
from student.bitnet.linear import FULL, Strengths, bit_linears, set_strengths

ASYNCHRONY = 0.4  # how far apart temperatures are; the best of seven in Hestia (arXiv:2601.20745)


@dataclass(frozen=True)
class Drift:
    """Relative differences ||after - before|| / ||before|| of final hidden states over all tokens.

    norms: of the added norms alone, None where there are none. quantised: of norms and quantisation.
    """

    norms: float | None
    quantised: float


class _Sizes:
    """Sums over tokens, float32 [I]: of n^2 log r, and of n^2."""

    def __init__(self, size: int, eps: float) -> None:
        self._eps = eps
        self._logs, self._shares = torch.zeros(2, size)

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().float().cpu().flatten(0, -2)
        r_T1 = (x_TI.square().mean(-1, keepdim=True) + self._eps).sqrt()
        share_TI = (x_TI / r_T1).square()
        self._logs += (share_TI * r_T1.log()).sum(0)
        self._shares += share_TI.sum(0)

    def weight(self) -> Tensor:
        """Channels that were never active get the size of all others together."""
        common = self._logs.sum() / self._shares.sum()
        return torch.where(self._shares > 0, self._logs / self._shares, common).exp()


@torch.no_grad()
def convert_calibrated(student: Any, conversion: str, samples: Sequence[Tensor]) -> Drift:
    """Convert the decoder layers of a full-precision student, with norms calibrated on every other sample and
    the drift measured on the rest.

    samples: token ids, int64 [T] each; a single one serves for both. The student stays in the mode it is in.
    """
    measured = samples[1::2] or samples
    layers, training = student.get_decoder().layers, student.training
    student.eval()
    before = final_states(student, measured)
    convert_layers(
        layers, conversion, norm_epsilon(student.config), lambda: final_states(student, samples[::2])
    )
    drift = Drift(
        norms=distance(before, final_states(student, measured, Strengths(0, 0, 1)))
        if conversion != "none"
        else None,
        quantised=distance(before, final_states(student, measured)),
    )
    student.train(training)
    return drift


@torch.no_grad()
def convert_layers(layers: nn.ModuleList, conversion: str, eps: float, run: Callable[[], object]) -> None:
    """Convert decoder layers, with norms calibrated on what passes them.

    Args:
        layers: in full precision.
        conversion: of `convert.CONVERSIONS`.
        eps: of the norms that are added.
        run: has some samples pass the layers.
    """
    names = normed(layers, conversion)
    linears: dict[str, Any] = {name: layers.get_submodule(name) for name in names}
    sizes = {name: _Sizes(linear.in_features, eps) for name, linear in linears.items()}
    handles = [linears[name].register_forward_pre_hook(_adder(sums)) for name, sums in sizes.items()]
    if names:
        run()
    for handle in handles:
        handle.remove()
    convert(layers, names, eps)
    for name, sums in sizes.items():
        converted: Any = layers.get_submodule(name)
        converted.rms_norm.weight.copy_(sums.weight())


@torch.no_grad()
def convert_trained(
    student: Any, conversion: str, trained: Iterable[Mapping[str, Tensor]], samples: Sequence[Tensor]
) -> Drift | None:
    """Convert a full-precision student and give it weights that were trained in converted layers.

    Args:
        student: in full precision; it stays in the mode it is in.
        conversion: of `convert.CONVERSIONS`.
        trained: weights by their names in the student, part by part.
        samples: as of `convert_calibrated`.

    Returns:
        How far the student moved; None without samples.
    """
    training = student.training
    student.eval()
    before = final_states(student, samples) if samples else []
    convert_student(student, conversion)
    parameters = dict(student.named_parameters())
    for part in trained:
        for name, tensor in part.items():
            parameters[name].copy_(tensor)
    drift = Drift(norms=None, quantised=distance(before, final_states(student, samples))) if samples else None
    student.train(training)
    return drift


def _adder(sums: _Sizes) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.add(args[0])

    return hook


@torch.no_grad()
def final_states(student: Any, samples: Collection[Tensor], strengths: Strengths = FULL) -> list[Tensor]:
    """Behind the final norm, float32 [T, D] per sample; BitLinear layers with these strengths."""
    set_strengths(student, strengths)
    for _, layer in bit_linears(student):
        layer.train()  # in eval mode they are always fully quantised
    states = [
        student.get_decoder()(input_ids=tokens_T[None].to(student.device), use_cache=False)
        .last_hidden_state[0]
        .float()
        for tokens_T in samples
    ]
    set_strengths(student, FULL)
    return states


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """||after - before|| / ||before|| over all tokens of all samples."""
    difference = sum(float((one - other).square().sum()) for one, other in zip(before, after, strict=True))
    return math.sqrt(difference / sum(float(one.square().sum()) for one in before))


def curvatures(student: Any, samples: Sequence[Tensor]) -> dict[str, float]:
    """How much the loss bends in each ternary matrix, by name: the trace of the empirical Fisher matrix, the
    sum of squared gradients of the next-token loss over some samples, of the unquantised student.

    samples: token ids, int64 [T] each.
    """
    layers = dict(bit_linears(student))
    weights = [layer.weight for layer in layers.values()]
    sums, training = [0.0] * len(weights), student.training
    student.eval()  # without dropout
    set_strengths(student, Strengths(0, 0, 1))
    for layer in layers.values():
        layer.train()  # in eval mode they are always fully quantised
    for tokens_T in samples:
        tokens_1T = tokens_T[None].to(student.device)
        logits_TV = student(input_ids=tokens_1T, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits_TV, tokens_1T[0, 1:])
        grads = torch.autograd.grad(loss, weights)
        sums = [total + float(grad.float().square().sum()) for total, grad in zip(sums, grads, strict=True)]
    set_strengths(student, FULL)
    student.train(training)
    return dict(zip(layers, sums, strict=True))


def relative_temperatures(curvature: dict[str, float]) -> dict[str, float]:
    """Factors of the matrices' temperatures, exp(-ASYNCHRONY sigmoid(z)), with z the logarithm of a matrix's
    curvature in standard deviations from the mean; to three places, so that all processes get the same.
    """
    logs = {name: math.log(max(value, 1e-30)) for name, value in curvature.items()}
    mean, deviation = statistics.fmean(logs.values()), statistics.pstdev(logs.values())
    scores = {name: (value - mean) / (deviation + 1e-8) for name, value in logs.items()}
    return {name: round(math.exp(-ASYNCHRONY / (1 + math.exp(-z))), 3) for name, z in scores.items()}


def set_relative_temperatures(student: Any, samples: Sequence[Tensor]) -> None:
    """Give every ternary matrix the factor of its temperature."""
    factors = relative_temperatures(curvatures(student, samples))
    for name, layer in bit_linears(student):
        layer.relative_temperature = factors[name]
