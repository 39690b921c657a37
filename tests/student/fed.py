"""`distily-train from-cache` that writes down what each step was fed: `python -m tests.student.fed RUNS`.

RUNS is a JSON list of argument lists, for runs one after the other, since a process takes seconds to start.
Each leaves fed-<rank>of<processes>.jsonl in its output directory: a line [step, [[sample id, learned tokens],
...]] for each batch that the model was given; and keeps-<rank>of<processes>.json, see `Keeps`. Where a file
hold-<step> lies there, the run writes its process ids to held-<rank> before that step, and stands still for
good.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor, nn

import student.bitnet
import student.bitnet.shared_input
import student.training.run
from featurestore.reader import CodedSample
from student.bitnet import BitLinear, bit_linears, halve_masters
from student.cli import main
from student.data.batches import CachedDataset, Collator
from student.shards import rows
from student.training.trainer import CacheTrainer

quantise = student.bitnet.shared_input._quantise


class Keeps(TypedDict):
    """What a process holds when it saves a checkpoint: numbers of parameters, of moments of AdamW, and of
    ternary weights that are kept; and how many inputs of layers its training steps have quantised until then.
    """

    weights: int
    moments: int
    ternary: int
    inputs: int


class Noting(Collator):
    """A collator whose batches carry the ids of their samples."""

    def __call__(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        """The batch, with `fed`."""
        return super().__call__(samples) | {"fed": [[s.id, int(s.loss_mask.sum())] for s in samples]}


class Recorder(CacheTrainer):
    """A trainer that takes the ids out again where the model gets its batch."""

    inputs = 0
    counts = False  # whether `inputs` counts

    def _collator(self, dataset: CachedDataset, pack: bool, drop_idle: bool) -> Collator:
        return Noting(dataset.groups, self._pad_token, pack, drop_idle)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Trainer's own."""
        step, rank, directory = self.state.global_step, self.args.process_index, Path(self.args.output_dir)
        if (directory / f"hold-{step}").exists():
            (directory / f"held-{rank}.tmp").write_text(str(os.getpid()))
            (directory / f"held-{rank}.tmp").rename(directory / f"held-{rank}")
            time.sleep(600)
        with (directory / f"fed-{rank}of{self.args.world_size}.jsonl").open("a") as file:
            file.write(json.dumps([step, inputs.pop("fed")]) + "\n")
        Recorder.counts = True
        loss: Tensor = super().training_step(model, inputs, *args)
        Recorder.counts = False
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own."""
        super()._save_optimizer_and_scheduler(output_dir)
        moments = [state["exp_avg"] for state in self.optimizer.state.values() if "exp_avg" in state]
        kept = [layer._kept for _, layer in bit_linears(self.model) if layer._kept is not None]
        keeps: Keeps = {
            "weights": sum(rows(parameter).values.numel() for parameter in self.model.parameters()),
            "moments": sum(rows(moment).values.numel() for moment in moments),
            "ternary": sum(one.ternary.numel() for one in kept),
            "inputs": Recorder.inputs,
        }
        name = f"keeps-{self.args.process_index}of{self.args.world_size}.json"
        (Path(self.args.output_dir) / name).write_text(json.dumps(keeps))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's own."""
        inputs.pop("fed")
        return super().prediction_step(model, inputs, *args, **kwargs)


def counted(x: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The quantisation of a layer's input."""
    Recorder.inputs += Recorder.counts
    return quantise(x, dtype)


def halved(model: Any) -> None:
    """`halve_masters`. FSDP2 makes a unit of the norms in a layer, which are float32, and puts a node of
    autograd before each: gradients that arrive there are summed up before they meet others. Here there is
    such a node in any case, so that sums are taken in the same order.
    """
    halve_masters(model)
    for module in model.get_decoder().layers.modules():
        if not isinstance(module, BitLinear) and list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda _, args: (args[0].view_as(args[0]), *args[1:]))


def run(arguments: Sequence[str]) -> None:
    """One run in this process; AssertionError unless it succeeds."""
    Recorder.inputs = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.training.run, "CacheTrainer", Recorder)
        patch.setattr(student.bitnet.shared_input, "_quantise", counted)
        patch.setattr(student.bitnet, "halve_masters", halved)
        patch.setattr(sys, "argv", ["distily-train", "from-cache", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code, arguments


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        run(one)
