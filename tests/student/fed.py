"""`distily-train from-cache` that writes down what each step was fed: `python -m tests.student.fed RUNS`.

RUNS is a JSON list of argument lists, for runs one after the other, since a process takes seconds to start.
Each leaves fed-<rank>of<processes>.jsonl in its output directory: a line [step, [[sample id, learned tokens],
...]] for each batch that the model was given. Where a file hold-<step> lies there, the run writes its process
ids to held-<rank> before that step, and stands still for good.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import student.training.run
from featurestore.reader import CodedSample
from student.cli import main
from student.data.batches import CachedDataset, Collator
from student.training.trainer import CacheTrainer


class Noting(Collator):
    """A collator whose batches carry the ids of their samples."""

    def __call__(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        """The batch, with `fed`."""
        return super().__call__(samples) | {"fed": [[s.id, int(s.loss_mask.sum())] for s in samples]}


class Recorder(CacheTrainer):
    """A trainer that takes the ids out again where the model gets its batch."""

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
        loss: Tensor = super().training_step(model, inputs, *args)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's own."""
        inputs.pop("fed")
        return super().prediction_step(model, inputs, *args, **kwargs)


def run(arguments: Sequence[str]) -> None:
    """One run in this process; AssertionError unless it succeeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.training.run, "CacheTrainer", Recorder)
        patch.setattr(sys, "argv", ["distily-train", "from-cache", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code, arguments


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        run(one)
