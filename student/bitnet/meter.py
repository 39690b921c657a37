"""What latent weights do between two looks: flips, zeros, weights near a threshold, scales, standstill."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from student.bitnet.chains import parts
from student.bitnet.linear import BitLinear, bit_linears
from student.bitnet.quantizers import quantize_weight
from student.shards import is_sharded, over_all, rows

EDGE = 0.05  # how near to a rounding threshold counts as its edge, in units of the scale
_SAMPLE = 4096  # weights per layer, evenly spread, that are looked at for movement


class FlipMeter:
    """How the ternary weights move, and what they are made of. Costs two bits per weight, of sharded weights
    two per weight of this process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(bit_linears(model))
        self._first_scales = {name: _quantized(layer)[1] for name, layer in self._layers.items()}
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Compare with the weights as they are now, next time."""
        self._last = {name: _packed(_quantized(layer)[0]) for name, layer in self._layers.items()}
        self._sample = {name: _spread(layer) for name, layer in self._layers.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Shares in [0, 1] of all ternary weights, and the drift of scales; the next call compares with this.

        bitnet_flip_rate: changed since the last look. bitnet_zero_share: in the dead zone, |w| < scale / 2,
        which rounds to 0. bitnet_edge_share: latent weights within EDGE * scale of a threshold at
        +-scale / 2, those that a small update can flip. bitnet_moved_share: latent weights, of an even
        sample, that changed at all since the last look. bitnet_scale_drift: mean over layers of
        |scale / first scale - 1|. All processes that share the weights have to call this at the same time.
        """
        layers = list(self._layers.values())
        counts = torch.zeros(5, dtype=torch.int64, device=layers[0].weight.device)
        drift = 0.0
        for name, layer in self._layers.items():
            ternary, scale = _quantized(layer)
            packed, sample = _packed(ternary), _spread(layer)
            counts += torch.stack(
                [
                    _differing(packed, self._last[name]),
                    # Not sums of comparisons, which take five times as long on a CPU.
                    ternary.numel() - torch.count_nonzero(ternary),
                    _near_edge(rows(layer.weight).values, scale),
                    (sample != self._sample[name]).sum(),
                    counts.new_tensor(sample.numel()),
                ]
            )
            drift += float((scale / self._first_scales[name] - 1).abs())
            self._last[name], self._sample[name] = packed, sample
        flips, zeros, edge, moved, sampled = over_all(counts, layers[0].weight).tolist()
        size = sum(layer.weight.numel() for layer in layers)
        return {
            "bitnet_flip_rate": flips / size,
            "bitnet_zero_share": zeros / size,
            "bitnet_edge_share": edge / size,
            "bitnet_moved_share": moved / sampled,
            "bitnet_scale_drift": drift / len(layers),
        }


@torch.no_grad()
def _quantized(layer: BitLinear) -> tuple[Tensor, Tensor]:
    """The ternary form of the rows that this process holds, and the scale of all."""
    if not is_sharded(layer):
        return layer.quantized()
    values = rows(layer.weight).values.float()
    return quantize_weight(values, over_all(values.abs().sum(), layer.weight) / layer.weight.numel())


def _near_edge(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """How many latent weights are within EDGE * scale of a threshold; int64 scalar."""
    count = torch.zeros((), dtype=torch.int64, device=weight_OI.device)
    for part in parts(weight_OI):
        distance = weight_OI[part].float().abs().sub_(scale / 2).abs_()
        count += torch.count_nonzero(distance < EDGE * scale)
    return count


def _packed(ternary_OI: Tensor) -> Tensor:
    """Four values a byte, each as its lowest two bits; uint8."""
    bits = (
        functional.pad(ternary_OI.flatten(), (0, -ternary_OI.numel() % 4)).view(torch.uint8).view(-1, 4) & 3
    )
    return bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """How many values are not the same in both; int64 scalar."""
    changed = one ^ other
    changed = (changed | changed >> 1) & 0b01010101  # one bit for each value, which are added up in pairs
    changed = (changed & 0b00110011) + (changed >> 2 & 0b00110011)
    return ((changed & 0b1111) + (changed >> 4)).sum()


def _spread(layer: BitLinear) -> Tensor:
    """A copy of the same 2 * _SAMPLE weights at most, evenly spread over all, however they are sharded: those
    of them that this process holds.
    """
    values, start = rows(layer.weight.detach())
    step = max(1, layer.weight.numel() // _SAMPLE)
    return values.flatten()[-start * layer.in_features % step :: step].clone()
