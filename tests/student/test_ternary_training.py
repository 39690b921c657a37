"""BitNet trainings through the command line: warm-up, stages, masters, resuming, one quantisation per
step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from student import bitnet
from student.bitnet import chains
from student.bitnet.master_weights import RoundingAdamW, round_stochastically
from student.config.trainer_checks import _check_groups
from student.errors import UserError
from tests.student.test_training import BITNET, logs, weights

Train = Callable[..., dict[str, Any]]
Run = Callable[..., tuple[int, str, str]]
SUBLN = (*BITNET, "--bitnet-conversion", "subln")
WARMUP = ("--bitnet-warmup-weights", 0.9, "--bitnet-warmup-activations", 0.5, "--bitnet-warmup-norms", 0.7)


def test_a_resumed_run_keeps_strength_stage_and_rounding(train: Train, run: Run, tmp_path: Path) -> None:
    """The checkpoint is from after the half, with weights still on their way."""
    flags = (*WARMUP, "--bitnet-two-stage", "--weight-decay", 0.5, "--bitnet-masters", "bf16", "--bf16")
    flags += ("--max_steps", 6, "--save_steps", 4, "--logging_steps", 1, "--save_total_limit", 5)
    flags += ("--lr_scheduler_type", "constant", "--learning-rate", 0.01)
    summary = train(tmp_path / "straight", *SUBLN, *flags)
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    train(tmp_path / "resumed", *SUBLN, *flags, "--resume_from_checkpoint", checkpoint)
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    entries = [log for log in logs(tmp_path / "straight") if "loss" in log]
    again = [log for log in logs(tmp_path / "resumed") if "loss" in log]
    watched = ("loss", "learning_rate", "bitnet_flip_rate", "bitnet_scale_drift")
    assert [[log[name] for name in watched] for log in entries] == [
        [log[name] for name in watched] for log in again
    ]
    assert [log["learning_rate"] for log in entries] == pytest.approx([0.01] * 3 + [0.01 * 2 / 3] * 3)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.0, 0.0]
    assert {part["exp_avg_sq"].dtype for part in state["state"].values()} == {torch.float32}
    drift = summary["step0_drift"]
    assert 0 < drift["norms"] < drift["quantised"]
    assert entries[0]["step0_drift_quantised"] == drift["quantised"]
    assert summary["bitnet_conversion"] == "subln"
    assert "calibrated norms alone" in (tmp_path / "straight" / "report.html").read_text()
    latent = [t for name, t in straight.items() if name.endswith("_proj.weight")]
    assert {tensor.dtype for tensor in latent} == {torch.bfloat16}
    for other, kind in (
        ((*BITNET, *flags[len(WARMUP) :]), "--bitnet-conversion none --bitnet-masters bf16"),
        ((*SUBLN, *flags, "--bitnet-masters", "fp32"), "--bitnet-conversion subln --bitnet-masters fp32"),
        (flags[-10:], "full precision"),
    ):
        code, _, err = run(tmp_path / "other", *other, "--resume_from_checkpoint", checkpoint)
        assert code == 2
        assert f"this run would resume with {kind}, but" in err
        assert "is of a run with --bitnet-conversion subln --bitnet-masters bf16" in err


@pytest.mark.parametrize("optimizer", [(), ("--bitnet-masters", "bf16")], ids=["AdamW", "rounding"])
def test_latent_weights_have_rates_of_their_own(
    train: Train, tmp_path: Path, optimizer: tuple[object, ...]
) -> None:
    """A rate and a decay of their own, through schedule, second stage and resuming; the others' are those of
    a run without.
    """
    flags = (*SUBLN, *optimizer, "--bitnet-two-stage", "--weight-decay", 0.5, "--max_steps", 4)
    flags += ("--save_steps", 1, "--logging_steps", 1, "--save_total_limit", 5, "--learning-rate", 0.01)
    flags += ("--warmup_steps", 0, "--lr_scheduler_type", "linear")
    own = ("--bitnet-learning-rate", 0.03, "--bitnet-weight-decay", 0.2)
    train(tmp_path / "own", *flags, *own)
    groups = []
    for step in (1, 3):
        state = torch.load(tmp_path / "own" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        groups.append([(group["lr"], group["weight_decay"]) for group in state["param_groups"]])
    late = 2 / 3 / 4  # what is left of the rates behind the third step, in the second stage
    assert groups[0] == [(pytest.approx(0.01 * 3 / 4), decay) for decay in (0.5, 0.0)] + [
        (pytest.approx(0.03 * 3 / 4), 0.2)
    ]
    assert groups[1] == [(pytest.approx(rate * late), 0.0) for rate in (0.01, 0.01, 0.03)]
    checkpoint = tmp_path / "own" / "checkpoint-1"
    train(tmp_path / "resumed", *flags, *own, "--resume_from_checkpoint", checkpoint)
    straight, resumed = weights(tmp_path / "own"), weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_separate_rates_move_latent_weights_only() -> None:
    model = torch.nn.Sequential(bitnet.BitLinear(8, 4), torch.nn.Linear(4, 4))
    groups = [{"params": [p for p in model.parameters() if p.dim() == n], "weight_decay": n} for n in (2, 1)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    bitnet.separate_rates(optimizer, model, bitnet.TernaryPlan())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    bitnet.separate_rates(optimizer, model, bitnet.TernaryPlan(learning_rate=3.0))
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1, 1.0, 2), (2, 1.0, 1), (1, 3.0, 2)]
    assert optimizer.param_groups[-1]["params"][0] is model[0].weight


def test_optimizers_with_groups_of_their_own_have_no_place_for_separate_rates() -> None:
    _check_groups("galore_adamw", None)
    with pytest.raises(UserError, match="--bitnet-learning-rate: --optim galore_adamw sorts the weights"):
        _check_groups("galore_adamw", "--bitnet-learning-rate")


@pytest.fixture
def run(distily_train: Run, cache: Path) -> Run:
    """Like `train`, for commands that end in an error."""
    quick = ("--per-device-train-batch-size", 4, "--eval-fraction", 0.25, "--report-to", "none", "--json")
    return lambda directory, *rest: distily_train(cache, "--output-dir", directory, *quick, *rest)


@pytest.mark.parametrize("masters", ["bf16", "fp32"])
def test_updates_that_vanish_in_rounding_are_an_error(run: Run, tmp_path: Path, masters: str) -> None:
    flags = ("--max_steps", 3, "--logging_steps", 1, "--warmup_steps", 0, "--learning-rate", "1e-20")
    code, _, err = run(tmp_path, *BITNET, *flags, "--bitnet-masters", masters)
    assert code == 1
    line = err.splitlines()[-1]  # not behind the progress bar
    assert line.startswith("distily-train: no latent weight moved since the last log, at a learning rate of")
    assert "of 1e-20" in line
    assert ("--bitnet-masters fp32" in line) == (masters == "bf16")


def test_weights_are_quantised_once_per_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the accumulation, and with the very weights that come of quantising always; Trainer's default
    optimizer changes weights without a trace.
    """
    flags = (*SUBLN, "--max_steps", 4, "--eval-fraction", 0, "--logging_steps", 4, "--gradient_checkpointing")
    flags += ("--gradient-accumulation-steps", 3, "--per-device-train-batch-size", 2)
    calls = 0

    def counting(weight: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return bitnet.quantize_weight(weight)

    monkeypatch.setattr(chains, "PLAIN", chains.PLAIN._replace(quantize_weight=counting))
    train(tmp_path / "once", *flags)
    # Drift, meter, 4 steps, and one that the last log leaves behind; there are 14 layers.
    assert calls <= 14 * (8 + 4 + 4)
    once, calls = calls, 0
    monkeypatch.setattr("student.bitnet.training.quantize_once", lambda _student: None)
    train(tmp_path / "always", *flags)
    assert calls > once + 14 * 4 * (2 * 3 - 1) - 14
    one, other = weights(tmp_path / "once"), weights(tmp_path / "always")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--bitnet-conversion", "sub"), "--bitnet-conversion sub is unknown; choose none, subln"),
        (("--bitnet-warmup-weights", 1.5), "--bitnet-warmup-weights is a share of the steps"),
        (("--bitnet-warmup-norms", 0.1), "--bitnet-warmup-norms has no effect without norms"),
        (
            ("--student-model-as-bitnet", "False", "--bitnet-masters", "bf16"),
            "--bitnet-masters has no effect",
        ),
        (("--bitnet-masters", "bf16", "--optim", "sgd"), "--optim sgd would round its updates away"),
        (("--bitnet-two-stage", "--lr_scheduler_type", "greedy"), "greedy follows the loss"),
        (("--bitnet-learning-rate", 0), "--bitnet-learning-rate 0: give a number above 0"),
        (("--bitnet-weight-decay", -0.1), "--bitnet-weight-decay -0.1: give a number >= 0"),
        (
            ("--student-model-as-bitnet", "False", "--bitnet-learning-rate", 1),
            "--bitnet-learning-rate has no effect",
        ),
    ],
)
def test_flags_that_do_not_fit(run: Run, tmp_path: Path, flags: tuple[object, ...], reason: str) -> None:
    code, _, err = run(tmp_path, "--student-model-as-bitnet", *flags)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert reason in err


def test_rounding_is_stochastic_and_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    ulp = 2.0**-8  # of bfloat16 in [1, 2) it is 2^-7; of [0.5, 1) this
    values = torch.full((100_000,), -(0.5 + 0.3 * ulp))
    rounded = round_stochastically(values, generator).float()
    assert set(rounded.tolist()) == {-0.5, -(0.5 + ulp)}
    # The share of the farther one is 0.3, and its deviation sqrt(0.21 / 100000) = 0.00145.
    assert (rounded != -0.5).float().mean().item() == pytest.approx(0.3, abs=5 * 0.00145)
    special = torch.tensor([0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan])
    same = round_stochastically(special, generator).float()
    assert torch.equal(same.nan_to_num(7.0), special.nan_to_num(7.0))


def test_the_rounding_optimizer_is_adamw() -> None:
    """In float32 the same as torch's; in bfloat16 right on average, where rounding to nearest stands
    still.
    """
    torch.manual_seed(0)
    start, gradients = torch.randn(300, 100), torch.randn(5, 300, 100)
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}

    def trained(kind: Any, dtype: torch.dtype, **more: Any) -> Tensor:
        parameter = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = kind([parameter], **{**settings, **more})
        for gradient in gradients:
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        return parameter.detach().float()

    torch.testing.assert_close(
        trained(RoundingAdamW, torch.float32), trained(torch.optim.AdamW, torch.float32), rtol=1e-5, atol=1e-6
    )
    rate = 1e-5
    wanted = trained(torch.optim.AdamW, torch.float32, lr=rate) - start
    halved = start.bfloat16().float()
    stuck = trained(torch.optim.AdamW, torch.bfloat16, lr=rate) - halved
    moved = trained(RoundingAdamW, torch.bfloat16, lr=rate) - halved
    assert (stuck == 0).float().mean() > 0.9
    # Per weight the noise of a rounding is far larger than the update; over all of them it averages out.
    slope = (moved * wanted).sum() / wanted.square().sum()
    noise = (moved.var() / wanted.square().sum()) ** 0.5
    assert abs(slope - 1) < 5 * noise < 0.5


class PlainAdamW(RoundingAdamW):
    """The update an operation at a time."""

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state, grad = self.state[parameter], parameter.grad.float()
        step = state["step"] = state.get("step", 0) + 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        zeros = torch.zeros_like(grad)
        mean = state["exp_avg"] = state.get("exp_avg", zeros).lerp(grad, 1 - beta1)
        square = state["exp_avg_sq"] = (state.get("exp_avg_sq", zeros) * beta2).addcmul(
            grad, grad, value=1 - beta2
        )
        scale = (square / (1 - beta2**step)).sqrt() + group["eps"]
        value = parameter.float() * (1 - lr * group["weight_decay"])
        value = value.addcdiv(mean, scale, value=-lr / (1 - beta1**step))
        if parameter.dtype == torch.bfloat16:
            generator = torch.Generator().manual_seed(hash((self._seed, step, place)) & ((1 << 63) - 1))
            noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32)
            rounded = ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
            value = torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
        parameter.copy_(value)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rounding_optimizer_is_its_plain_account_to_the_bit(
    dtype: torch.dtype, weight_decay: float
) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 33, 47), torch.randn(4, 2, 33, 47)
    start[0, 0, 0], gradients[2, 1, 0, 0], gradients[3, 1, 0, 1] = torch.inf, torch.nan, -torch.inf

    def trained(kind: type[RoundingAdamW]) -> list[Tensor]:
        parameters = [torch.nn.Parameter(part.to(dtype, copy=True)) for part in start]
        optimizer = kind(parameters, lr=0.01, weight_decay=weight_decay, seed=5)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.to(dtype)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for own, plain in zip(trained(RoundingAdamW), trained(PlainAdamW), strict=True):
        assert torch.equal(own.view(whole), plain.view(whole))


def test_rows_are_rounded_as_among_all() -> None:
    """So that it does not matter which process holds them."""

    def rounded(first: int, last: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return round_stochastically(values[first:last], generator, values.shape, first)

    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically(values, torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([rounded(0, 4), rounded(4, 7), rounded(7, 7)]), whole)


def test_noise_leaves_infinities_and_nan_alone() -> None:
    """A NaN with lower bits only would round to an infinity, one of ones beyond to zero."""
    bits = torch.tensor([0x7F80_0000, -0x80_0000, 0x7F80_0001, 0x7FFF_FFFF], dtype=torch.int32)
    values = bits.view(torch.float32).repeat(1000)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded.isinf(), values.isinf())


def test_all_processes_round_alike() -> None:
    def step(seed: int) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(64, 64).bfloat16())
        parameter.grad = torch.ones_like(parameter)
        torch.manual_seed(torch.randint(1000, ()).item())
        RoundingAdamW([parameter], lr=1e-3, seed=seed).step()
        return parameter.detach()

    assert torch.equal(step(1), step(1))
    assert not torch.equal(step(1), step(2))


def test_masters_are_really_bfloat16() -> None:
    model = torch.nn.Sequential(bitnet.BitLinear(8, 4))
    bitnet.halve_masters(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].bias.dtype == torch.float32
    model(torch.randn(2, 8)).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16
