"""How often a training step waits for its device: each value that the host reads empties a GPU's queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from featurestore.format.states.rotated import RotatedLayout
from student.data.decoding import decode_hidden
from student.training.trainer import CacheTrainer

# Operations whose result decides what runs next, or how large it is: `.item()`, bool(), shapes.
READING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
# Functions that bring numbers from the host or to it, which no dispatcher sees on a CPU.
COPYING = {"tensor", "as_tensor", "new_tensor", "scalar_tensor", "from_numpy", "tolist", "numpy", "cpu"}


class Operations(TorchDispatchMode):
    """Notes those of READING, and indices by booleans, which look for the true ones."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1:]))
        if name in READING or (name in ("index", "index_put", "index_put_") and masked):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes those of COPYING."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPYING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watch(TrainerCallback):  # type: ignore[misc]
    """From the begin of the second step to its end: forward and backward passes, clipping, the optimizer."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = Functions(self.found), Operations(self.found)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            for mode in self._modes:
                mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            for mode in reversed(self._modes):
                mode.__exit__(None, None, None)


@pytest.mark.parametrize("dtype", ["int4", "int2"])
def test_rotated_rows_are_decoded_without_waiting(dtype: str) -> None:
    found: list[str] = []
    rows = torch.zeros(5, RotatedLayout(dtype, 577).row_bytes, dtype=torch.uint8)
    with Functions(found), Operations(found):
        decode_hidden({f"{dtype}.577": rows})
    assert not found


TERNARY = ("--student-model-as-bitnet", "--bitnet-conversion", "subln")
KINDS = {
    "labels": ("--logits-weight", "0", "--ce-weight", "1"),
    "distribution": (),
    "hidden": ("--hidden-loss", "mse"),
    "ternary": TERNARY,
    "int8": (*TERNARY, "--bitnet-backward", "int8"),
    "rounding": (*TERNARY, "--bitnet-masters", "bf16"),
    "packed": ("--pack-rows",),
    "compiled": ("--torch-compile-backend", "eager"),
    "accumulation": ("--gradient-accumulation-steps", "2"),
}
# The number of learned positions, and transformers' question whether a row holds several samples, which it
# does not ask where it is compiled.
KNOWN = ["nonzero", "_local_scalar_dense"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_twice_in_each_forward_pass(
    kind: str, train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither in the backward pass nor in the optimizer."""
    watch, create = Watch(), CacheTrainer.__init__

    def watched(self: CacheTrainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.add_callback(watch)

    monkeypatch.setattr(CacheTrainer, "__init__", watched)
    train(tmp_path / "out", "--max-steps", "3", "--logging-steps", "3", "--eval-strategy", "no", *KINDS[kind])
    assert watch.found == KNOWN * (2 if kind == "accumulation" else 1)
