"""`distily-train plan` beside trainings: bytes of what stays are exact, the peak is that of the real step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from featurestore.format.schema import HiddenSpec, LogitsSpec, Sample
from student.blockwise import run as blockwise_run
from student.blockwise.run import BlockwiseRun
from student.config.parser import parse
from student.planning.advice import changes, fits, smallest_change
from student.planning.command import target_of
from student.planning.memory import MemoryPlan, Setting
from student.planning.optimizers import Parameter, optimizer_memory
from student.planning.standin import trace
from student.planning.training import longest_batch, parameters_of, plan_training
from student.planning.work import padded_positions
from student.training.run import PreparedTraining, build, prepare
from student.training.trainer import CacheTrainer
from tests.student.allocations import allocated_at_most
from tests.student.caches import random_samples, save_teacher, write_cache

SHAPE = ["--student-model-config", '{"num_hidden_layers": 2}']
DEEP = ["--student-model-config", '{"num_hidden_layers": 5}', "--copy-layers", "0,0,1,1,2"]
TERNARY = ["--student-model-as-bitnet"]
CHECKPOINTING = ["--gradient-checkpointing"]
PEAKS = [
    [],
    ["--bf16"],
    CHECKPOINTING,
    ["--optim", "adamw_torch"],
    ["--optim", "adamw_bnb_8bit"],
    ["--gradient-accumulation-steps", "2", "--optim", "adafactor"],
    ["--hidden-loss", "cosine", "--hidden-layers", "1", "--pack-rows"],
    TERNARY,
    [*TERNARY, "--bf16", "--bitnet-conversion", "per-projection", *CHECKPOINTING],
    [*TERNARY, "--bitnet-conversion", "subln", "--bitnet-backward", "int8"],
    [*TERNARY, "--bitnet-masters", "bf16", "--learning-rate", "1", "--gradient-accumulation-steps", "2"],
]
QUICK = ["--max-steps", "1", "--eval-strategy", "no", "--eval-on-start", "False", "--save-strategy", "no"]


def prepared(cache: Path, out: Path, *flags: str) -> PreparedTraining:
    quick = [*QUICK, "--report-to", "none", "--per-device-train-batch-size", "4"]
    return prepare(parse([str(cache), "--output-dir", str(out), *quick, *flags]))


class Gradients(TrainerCallback):  # type: ignore[misc]
    size = 0

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.size = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optim", "adamw_torch", "--freeze-embeddings"],
        ["--optim", "adafactor"],
        ["--optim", "sgd"],
        ["--optim", "adamw_bnb_8bit"],
        [*TERNARY, "--bitnet-conversion", "subln"],
        [*TERNARY, "--bitnet-masters", "bf16", "--learning-rate", "1"],
        ["--hidden-loss", "mse", "--hidden-layers", "1", "--projector", "linear"],
    ],
    ids=" ".join,
)
def test_what_stays_has_the_predicted_bytes(cache: Path, tmp_path: Path, flags: list[str]) -> None:
    if "adamw_bnb_8bit" in flags:
        pytest.importorskip("bitsandbytes")
    ready = prepared(cache, tmp_path, *SHAPE, *flags)
    whole = plan_training(ready, target_of()).memory.whole
    trainer, gradients = build(ready).trainer, Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    model = trainer.model
    assert whole["weights"] == sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    assert whole["gradients"] == gradients.size
    state = {
        value.data_ptr(): value.nbytes
        for each in trainer.optimizer.state.values()
        for value in each.values()
        if isinstance(value, torch.Tensor)
    }
    assert whole.get("optimizer state", 0) == sum(state.values())
    if trainer._ternary is not None:
        meter = trainer._ternary.meter
        kept = [*meter._last.values(), *meter._sample.values(), *meter._first_scales.values()]
        assert whole["meter of flips"] == sum(one.nbytes for one in kept)
        now = [tensor for layer in meter._layers.values() for tensor in layer.quantized()]
        assert whole["ternary weights"] == sum(one.nbytes for one in now)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A cache whose batches all have the same size: 20 samples of 24 tokens."""
    samples = [
        Sample(tokens=one.tokens, loss_mask=np.ones(24, bool)) for one in random_samples(20, 199, (24, 25))
    ]
    specs = [LogitsSpec(16), HiddenSpec(1, "bf16"), HiddenSpec(3, "f32")]
    return write_cache(tmp_path_factory.mktemp("even") / "store", teacher, samples, specs)


@pytest.mark.parametrize("flags", PEAKS, ids=" ".join)
def test_the_peak_is_that_of_real_steps(even: Path, tmp_path: Path, flags: list[str]) -> None:
    """To the byte, but for what the plan leaves out: scalars of Trainer, and of checkpointed layers the state
    of the random generator. Of a batch, torch's allocator knows the labels alone, those of each that is held.
    """
    if "adamw_bnb_8bit" in flags:
        pytest.importorskip("bitsandbytes")
    ready = prepared(even, tmp_path, *DEEP, "--eval-fraction", "0", "--max-steps", "2", *flags)
    plan = plan_training(ready, target_of()).memory
    planned = plan.peak - plan.at_peak["process"] - plan.at_peak["batch"]
    trainer, allocated = allocated_at_most(lambda: build(ready).trainer, CacheTrainer.train)
    batch = longest_batch(ready, 4)
    labels = plan.at_peak["batch"] // sum(map(_nbytes, batch.values())) * batch["labels"].nbytes
    generators = 5 * torch.get_rng_state().nbytes if "--gradient-checkpointing" in flags else 0
    reordered = 0
    if "--bf16" in flags and "AVX512" in torch.backends.cpu.get_cpu_capability():
        # oneDNN, which multiplies there, may hold what a product reads and writes in an order of its own.
        positions = batch["input_ids"].numel()
        shapes = [one.weight.shape for one in trainer.model.modules() if isinstance(one, torch.nn.Linear)]
        reordered = 2 * max(a * b + positions * (a + b) for a, b in shapes)
    assert 0 <= allocated - labels - planned <= 256 + generators + reordered


def _nbytes(part: Any) -> int:
    return sum(map(_nbytes, part.values())) if isinstance(part, dict) else int(part.nbytes)


def test_flops_are_those_of_the_products(cache: Path, tmp_path: Path) -> None:
    """Two per weight and position forward, four backward; with checkpointing layers go forward twice."""
    ready = prepared(cache, tmp_path, *SHAPE)
    batch = longest_batch(ready, 4)
    once, twice = (trace(ready, batch, 2, checkpointing=on, held=False).flops for on in (False, True))
    positions, learned = batch["input_ids"].numel(), int((batch["labels"] >= 0).sum())
    layers = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    products = 6 * (layers * positions + 199 * 64 * learned)
    assert once == products  # those of attention are in no weight, and are not counted
    last = 2 * 64 * 128  # of a layer, whose result nothing saved needs
    assert twice - once == 2 * (layers - last) * positions


def test_the_command(distily: Callable[..., tuple[int, str, str]], cache: Path, tmp_path: Path) -> None:
    code, out, err = distily("plan", cache, *SHAPE, "--json", "--max-steps", 7)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["work"]["steps"] == 7
    assert plan["fits"] is True
    assert plan["parameters"]["total"] == plan["parameters"]["trained"] > 0
    assert plan["estimated_seconds_per_step"] > 0
    assert sum(plan["memory"]["at_peak"].values()) == plan["memory"]["peak_bytes"]
    code, out, err = distily("plan", cache, *SHAPE, *TERNARY, "--gpu-memory", 0.5, "--processes", 2)
    assert code == 0, err
    assert "does not fit into a GPU of 0.50 GiB" in out
    assert "2 processes" in out
    assert "not estimated" in out
    assert not Path("trainer_output").exists()


def test_stages_are_planned_one_by_one(
    distily: Callable[..., tuple[int, str, str]], cache: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "student-model-config: {num_hidden_layers: 2}\nmax-steps: 4\nstages:\n"
        "  - {name: labels, logits-loss: none, ce-weight: 1}\n  - {name: distil}\n"
    )
    code, out, err = distily("plan", cache, "--recipe", recipe, "--json")
    assert code == 0, err
    stages = json.loads(out)["stages"]
    assert {name: plan["work"]["steps"] for name, plan in stages.items()} == {"labels": 2, "distil": 2}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fsdp"], "--processes"),
        (["--fsdp", "--processes", "2", "--optim", "adafactor"], "--optim adafactor"),
        (["--nonsense"], "unknown flag --nonsense"),
        (["--gpu-memory", "0"], "--gpu-memory"),
        (["--processes", "0"], "--processes"),
        (["--hidden-loss", "mse", "--hidden-layers", "2"], "hidden.L2"),
    ],
)
def test_refusals(refused: Callable[..., str], cache: Path, flags: list[str], said: str) -> None:
    assert said in refused("plan", cache, *SHAPE, *flags)


def test_an_output_directory_that_is_given_is_checked(
    refused: Callable[..., str], cache: Path, trained: Path
) -> None:
    assert "--overwrite-output-dir" in refused("plan", cache, "--output-dir", trained)


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="--optim lomo"):
        optimizer_memory("lomo", {}, [], on_gpu=True)


def test_paged_states_are_in_host_memory() -> None:
    parameters = [Parameter(shape=(1000, 1000), item=4, trained=True)]
    paged = optimizer_memory("paged_adamw_32bit", {"optim_bits": 32}, parameters, on_gpu=True)
    assert (paged.state, paged.paged) == (0, 8_000_000)
    assert optimizer_memory("paged_adamw_32bit", {}, parameters, on_gpu=False).state == 8_000_000


def test_frozen_parameters_have_no_state() -> None:
    parameters = [Parameter(shape=(10, 10), item=4, trained=False)]
    assert optimizer_memory("adamw_torch", {}, parameters, on_gpu=True).state == 0


def test_parameters_count_once_where_they_are_shared() -> None:
    model = torch.nn.ModuleList([torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3, bias=False)])
    model[1].weight = model[0].weight
    (only,) = parameters_of(model, [])
    assert only.embedding
    assert only.count == 12


SETTING = Setting(rows=12, accumulated=2, checkpointing=False, optimizer="adamw_torch_fused")


def memory(size: int) -> MemoryPlan:
    return MemoryPlan(moments={"losses": {"weights": size}}, paged=0)


def test_changes_keep_the_global_batch_and_come_fewest_first() -> None:
    listed = list(changes(SETTING))
    assert {one.rows * one.accumulated for one, _ in listed} == {24}
    assert {one.rows for one, _ in listed} == {12, 6, 3}
    counts = [len(flags) for _, flags in listed]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert len(listed) == len({one for one, _ in listed}) == 11


def test_the_smallest_change_that_fits_is_found() -> None:
    def evaluate(setting: Setting) -> MemoryPlan:
        return memory(setting.rows * (50 if setting.checkpointing else 100))

    found = smallest_change(SETTING, 700, evaluate, lambda _: 0)
    assert found is not None
    assert found.setting == replace(SETTING, rows=6, accumulated=4)
    found = smallest_change(SETTING, 200, evaluate, lambda _: 0)
    assert found is not None
    assert found.setting == replace(SETTING, rows=3, accumulated=8, checkpointing=True)
    assert smallest_change(SETTING, 100, evaluate, lambda _: 0) is None
    assert smallest_change(SETTING, 10**9, evaluate, lambda _: 10**9) is None


def test_a_margin_is_left_beside_the_process() -> None:
    assert fits(memory(1000), 1101)
    assert not fits(memory(1000), 1099)
    process = MemoryPlan(moments={"losses": {"process": 100}}, paged=0)
    assert fits(process, 100)


def test_batches_are_padded_to_their_longest() -> None:
    assert padded_positions([3, 1, 2, 5, 4], 2) == 6 + 10 + 4


def test_blocks_are_counted_beside_the_whole_student(tmp_path: Path) -> None:
    """Samples of 20 positions; D = 64."""
    teacher = save_teacher(tmp_path / "teacher", 4)
    boundaries = [LogitsSpec(8), *(HiddenSpec(layer, "bf16") for layer in (1, 2, 3, 4))]
    samples = random_samples(40, 199, lengths=(20, 21))
    store = write_cache(tmp_path / "store", teacher, samples, boundaries)
    flags = ["--init", "blockwise", *TERNARY, "--blockwise-steps", "5", "--eval-fraction", "0.25"]
    ready = prepared(store, tmp_path / "out", *flags)
    plan = plan_training(ready, target_of())
    blocks = plan.blockwise
    assert blocks is not None
    assert (blocks.blocks, blocks.steps, blocks.tokens) == (4, 5, 5 * 4 * 20)
    assert blocks.flops == 6 * plan.parameters["ternary"] * 400
    assert blocks.states_bytes == (5 * 4 + len(ready.data.split.held_out)) * 20 * 64 * 2
    assert plan.seconds_of_blocks is not None
    run = BlockwiseRun(ready.blockwise, ready.request.training)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        written = blockwise_run.write_stream

        def write(path: Path, states: Any) -> None:
            written(path, states)
            sizes.append(path.stat().st_size)

        patch.setattr(blockwise_run, "write_stream", write)
        run.train(overwrite=False)
    assert set(sizes) == {blocks.states_bytes}
    teachers_states = prepared(store, tmp_path / "out", *flags, "--blockwise-inputs", "teacher")
    inputs = plan_training(teachers_states, target_of()).blockwise
    assert inputs is not None and inputs.states_bytes == 0
