"""Latent weights in bfloat16, and an optimizer that keeps their updates from vanishing in it.

bfloat16 has 8 significant bits, so an update below 1/512 of a weight is rounded away, every time: with plain
bfloat16 masters most weights never move. Stochastic rounding moves them with the probability that makes the
mean exact (Gupta et al. 2015, arXiv:1502.02551).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from student.bitnet.linear import bit_linears
from student.shards import rows, shard_like

MASTERS = ("fp32", "bf16")


def halve_masters(model: nn.Module) -> None:
    """Keep the latent weights of all BitLinear layers in bfloat16."""
    for _, layer in bit_linears(model):
        layer.weight.data = layer.weight.data.to(torch.bfloat16)


def round_stochastically(
    values: Tensor, generator: torch.Generator, shape: torch.Size | None = None, start: int = 0
) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that make the expectation exact; infinities and NaN
    stay what they are.

    shape: of the whole tensor of which these are the rows from `start` on, so that they are rounded as they
    are among all; None: these are all.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, shape or values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    if shape is not None:
        noise = noise[start : start + len(values)]
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    # The lower bits of an infinity are zero, so noise leaves it alone; those of NaN may be anything.
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose moments are float32 and which writes bfloat16
    parameters with stochastic rounding.

    Of the float32 values of a parameter only its update exists, one parameter at a time. The noise is a
    function of seed, step and the weight's place, so all processes of a run draw the same, whatever part of
    the weights they hold, and a resumed run goes on as one that was not interrupted.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; `closure` as of every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), step, lr = group["betas"], state["step"], group["lr"]
        own, start = rows(parameter)
        grad = rows(grad).values.float()
        mean, square = rows(state["exp_avg"]).values, rows(state["exp_avg_sq"]).values
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value = own.float()  # the parameter itself where it is float32
        if group["weight_decay"]:
            value.mul_(1 - lr * group["weight_decay"])
        value.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
        if parameter.dtype == torch.bfloat16:
            generator = torch.Generator(parameter.device)
            generator.manual_seed(hash((self._seed, step, place)) & ((1 << 63) - 1))
            value = round_stochastically(value, generator, parameter.shape, start)
        if value is not own:
            own.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every torch optimizer, which gives moments the dtype of their parameter; ours stay
        float32.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        for place, parameter in zip(
            places, (p for group in self.param_groups for p in group["params"]), strict=True
        ):
            for name in ("exp_avg", "exp_avg_sq"):
                if place in saved:
                    own = shard_like(saved[place][name], parameter)
                    self.state[parameter][name] = own.to(parameter.device, copy=True)
