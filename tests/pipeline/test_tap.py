"""The residual stream is found in decoders of every make, and refused where it cannot be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.capture.tap import ResidualTap, decoder_layers
from pipeline.errors import EngineError

DEPTH, WIDTH, ROWS = 3, 8, 5


class Norm(nn.Module):
    """An RMS norm; with a residual it adds first, in place, as vLLM's fused kernels do."""

    def __init__(self, ignores_residual: bool = False) -> None:
        super().__init__()
        self.ignores_residual = ignores_residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x / x.square().mean(-1, keepdim=True).sqrt()
        if self.ignores_residual:
            return self.forward(x), residual
        residual.add_(x)
        x.copy_(self.forward(residual))
        return x, residual


class Fused(nn.Module):
    """Llama's way: (delta, residual), to be added by the next norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.norm(hidden)
        else:
            hidden, residual = self.norm(hidden, residual)
        hidden, residual = self.norm(self.linear(hidden), residual)
        return self.linear(hidden), residual


class Parallel(nn.Module):
    """Cohere's way: (stream, what is left of the stream before)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return hidden + self.linear(hidden), hidden


class Plain(nn.Module):
    """GPT-2's way: the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return hidden + self.linear(hidden)


class Body(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], norm: nn.Module, rounds: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.last = norm
        self.rounds = rounds
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        hidden, residual = self.embed(ids), None
        adds = isinstance(self.blocks[0], Fused)
        self.seen = [hidden.clone()]
        for block in [*self.blocks] * self.rounds:
            out = block(positions=ids, hidden=hidden, residual=residual)
            hidden, *rest = out if isinstance(out, tuple) else (out,)
            residual = rest[0] if isinstance(self.blocks[0], (Fused, Parallel)) else None
            self.seen.append(hidden + residual if adds else hidden.clone())
        out = self.last(hidden, residual)
        return out[0] if isinstance(out, tuple) else out


class Model(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({"decoder": body})


@pytest.mark.parametrize(
    ("block", "norm"),
    [(Fused, Norm()), (Parallel, Norm(ignores_residual=True)), (Plain, Norm())],
    ids=["added-by-the-next-norm", "left-over-beside-it", "alone"],
)
@torch.inference_mode()
def test_every_stream_is_the_models_own(block: Callable[[], nn.Module], norm: nn.Module) -> None:
    body = Body(block, norm)
    tap = ResidualTap(Model(body), DEPTH, WIDTH, (0, 1, 2))
    for ids in (torch.arange(ROWS), torch.arange(2) + 3):
        body(ids)
        for stream, expected in zip(tap.streams(len(ids)), body.seen, strict=False):
            torch.testing.assert_close(stream, expected)


@torch.inference_mode()
def test_a_pass_that_tells_nothing_leaves_the_question_open() -> None:
    body = Body(Parallel, Norm(ignores_residual=True))
    tap = ResidualTap(Model(body), DEPTH, WIDTH, (2,))
    weight = body.embed.weight.clone()
    body.embed.weight.zero_()
    for block in body.blocks:
        block.linear.bias.zero_()
    body(torch.arange(ROWS))  # 0 / 0 in the norm
    tap.streams(ROWS)
    body.embed.weight.copy_(weight)
    body(torch.arange(ROWS))
    torch.testing.assert_close(tap.streams(ROWS)[0], body.seen[2])


class Tuple3(Plain):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), None, None


class Gate(Plain):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), torch.zeros(1)


class Bidirectional(nn.Module):
    """A norm that makes of the stream something else each time it is asked."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.randn_like(x)


def run(body: Body, layers: tuple[int, ...] = (0, 1, 2), rows: int = ROWS) -> None:
    tap = ResidualTap(Model(body), DEPTH, WIDTH, layers)
    body(torch.arange(ROWS))
    tap.streams(rows)


@pytest.mark.parametrize(
    ("body", "rows", "reason"),
    [
        (lambda: Body(Plain, Norm(), rounds=2), ROWS, "more than once"),
        (lambda: Body(Tuple3, Norm()), ROWS, "3 values"),
        (lambda: Body(Gate, Norm()), ROWS, "no residual"),
        (lambda: Body(Fused, Bidirectional()), ROWS, "repeats the model's output"),
        (lambda: Body(Plain, Norm()), ROWS + 1, "one row per position"),
    ],
)
@torch.inference_mode()
def test_what_cannot_be_told_is_refused(body: Callable[[], Body], rows: int, reason: str) -> None:
    with pytest.raises(EngineError, match=f"--hidden-layers.*{reason}.*--engine transformers"):
        run(body(), rows=rows)


def test_a_model_without_such_a_list_is_refused_when_streams_are_asked_for() -> None:
    tap = ResidualTap(Model(Body(Plain, Norm())), 7, WIDTH, (1,))
    with pytest.raises(EngineError, match="no list of its 7 layers"):
        tap.streams(ROWS)


def test_the_outermost_list_of_that_length_is_the_decoder() -> None:
    body = Body(Plain, Norm())
    body.blocks[0].experts = nn.ModuleList(nn.Identity() for _ in range(DEPTH))
    owner, layers = decoder_layers(Model(body), DEPTH)
    assert owner is body and layers is body.blocks
    with pytest.raises(EngineError, match=r"no list of its 7 layers.*--engine transformers"):
        decoder_layers(Model(body), 7)
