"""A plan with `--fsdp` beside steps that FSDP2 really takes, of one process whose partners are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from student.config.parser import parse
from student.planning.command import target_of
from student.planning.sharding import IN_BACKWARD
from student.planning.training import longest_batch, parameters_of, plan_training
from student.training.model import DistillationModel
from student.training.run import assemble, prepare
from tests.student.allocations import allocated_at_most

WORLD = 4


@pytest.fixture
def partners() -> Iterator[None]:
    """A group of WORLD processes, of which this is the first; what the others send is never read."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield
    distributed.destroy_process_group()


def test_the_peak_of_shards_is_bounded(partners: None, cache: Path, tmp_path: Path) -> None:
    """The plan is not less than what is allocated, nor more by what it counts twice to be sure."""
    shape = ["--student-model-config", '{"num_hidden_layers": 5}', "--copy-layers", "0,0,1,1,2"]
    flags = ["--optim", "adamw_torch_fused", "--per-device-train-batch-size", "4", "--eval-fraction", "0"]
    ready = prepare(parse([str(cache), "--output-dir", str(tmp_path), *shape, *flags]))
    plan = plan_training(ready, target_of(processes=WORLD, sharded=True)).memory
    planned = plan.peak - plan.at_peak["process"] - plan.at_peak["batch"]
    batch = longest_batch(ready, 4)

    def sharded() -> DistillationModel:
        model = assemble(ready).model
        mesh = init_device_mesh("cpu", (WORLD,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in model.student.get_decoder().layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model.train()

    def train(model: DistillationModel) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    model, allocated = allocated_at_most(sharded, train)
    parameters = parameters_of(model, model.student.get_decoder().layers)
    layer = sum(one.size for one in parameters if one.layer == 0)
    around = sum(one.size for one in parameters if one.layer is None)
    assert allocated <= planned <= allocated + IN_BACKWARD * layer + around
