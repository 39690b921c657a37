"""`--init blockwise`: ternary blocks from the teacher's cached states, one after the other, through kills and
on caches of every kind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from distily.units import number
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from student.blockwise.module import BlockModule, relative_errors
from student.blockwise.plan import drawn, plan_blocks
from student.blockwise.reading import BlockReader
from student.blockwise.run import BlockwiseRun
from student.config.parser import parse
from student.errors import UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.plan import StudentPlan
from student.training.run import prepare
from tests import architectures, teachers
from tests.command import call, generate, run_module
from tests.student.caches import random_samples, save_teacher, write_cache
from tests.tokenizers import own_bpe

Run = Callable[..., tuple[int, str, str]]
DEPTH = 4
ALL = [LogitsSpec(8), *(HiddenSpec(layer, "bf16") for layer in range(1, DEPTH + 1))]
QUICK = ("--report-to", "none", "--eval-fraction", 0.25, "--max-steps", 1, "--json")
FLAGS = ("--init", "blockwise", "--student-model-as-bitnet", "--blockwise-steps", 30, *QUICK)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), DEPTH)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, deep: Path) -> Path:
    """All boundaries."""
    return write_cache(tmp_path_factory.mktemp("all") / "store", deep, random_samples(36, 199), ALL)


@pytest.fixture
def blockwise(distily_train: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a successful training; its summary."""

    def run(store: Path, *arguments: object, out: Path = tmp_path / "out") -> dict[str, Any]:
        code, printed, err = distily_train(store, "--output-dir", out, *FLAGS, *arguments)
        assert code == 0, err
        summary: dict[str, Any] = json.loads(printed)
        return summary

    return run


def test_every_block_is_nearer_to_the_teacher_than_rounding(
    blockwise: Callable[..., dict[str, Any]], store: Path, tmp_path: Path
) -> None:
    summary = blockwise(store, "--bitnet-conversion", "subln", "--learning-rate", 1e-12)
    made = summary["blockwise"]
    assert [block["layers"] for block in made["blocks"]] == [[0], [1], [2], [3]]
    assert all(block["error_after"] < 0.95 * block["error_before"] for block in made["blocks"])
    assert "held-out" in made["measured_on"]
    student = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    block = load_file(tmp_path / "out" / "blockwise" / "block-002.safetensors")[name]
    torch.testing.assert_close(student[name], block, rtol=0, atol=1e-8)
    assert not list((tmp_path / "out" / "blockwise").glob("states*"))
    assert "Blocks" in (tmp_path / "out" / "report.html").read_text()
    call("distily-train", "card", tmp_path / "out")
    error = number(made["blocks"][3]["error_after"])
    assert re.search(rf"\| 4 +\| 3 +\| 4 .*{re.escape(error)}", (tmp_path / "out" / "README.md").read_text())


def test_blocks_between_every_nth_state_and_of_a_selection_of_layers() -> None:
    """Layers belong to the first state behind the teacher's, and the student's last one to the last state."""
    blocks = plan_blocks(range(30), [0, *range(4, 30, 4), 30], 30)
    assert [len(block.layers) for block in blocks] == [4] * 7 + [2]
    assert [block.given for block in blocks[1:]] == [block.target for block in blocks[:-1]]
    assert [block.last for block in blocks] == [False] * 7 + [True]
    chosen = plan_blocks([0, 3, 4, 7, 9], [2, 4, 6, 8, 10], 10)
    assert [(block.layers, block.given, block.target) for block in chosen] == [
        ((0,), 0, 2),
        ((1,), 2, 4),
        ((2,), 4, 6),
        ((3,), 6, 8),
        ((4,), 8, 10),
    ]
    (first,) = plan_blocks([0, 1], [2, 4], 4)
    assert (first.layers, first.target, first.last) == ((0, 1), 4, True)


@pytest.mark.parametrize(
    ("copied", "boundaries", "flag"),
    [
        (range(4), (1, 2, 3), "--final"),
        (range(4), (1, 3, 4), "--hidden-layers 2`"),
        ((0, 2, 1), (1, 2, 3, 4), "--copy-layers"),
    ],
)
def test_what_blocks_cannot_be_made_of(
    copied: tuple[int, ...], boundaries: tuple[int, ...], flag: str
) -> None:
    with pytest.raises(UserError, match=flag):
        plan_blocks(copied, boundaries, 4)


def test_steps_take_epochs_one_after_the_other_each_from_its_end() -> None:
    orders = ([2, 0, 1], [1, 2, 0], [0, 1, 2])
    assert drawn(orders.__getitem__, 7) == [1, 0, 2, 0, 2, 1, 2]
    assert drawn(orders.__getitem__, 2) == [1, 0]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "granite", "qwen3"])
def test_blocks_in_a_row_are_the_teacher(name: str, tmp_path: Path) -> None:
    """Of every kind of layer, with what an architecture does around them; in full precision."""
    teacher = AutoModelForCausalLM.from_pretrained(architectures.make(name, tmp_path)).eval()
    ids = torch.randint(3, 90, (2, 40))
    plan = StudentPlan(
        config=teacher.config,
        checkpoint=None,
        layers=[0, 1, 2, 3],
        teacher=CheckpointTensors(tmp_path),
        conversion="none",
        converted=False,
        masters="fp32",
        freeze_embeddings=False,
    )
    with torch.no_grad():
        expected = teacher(ids, output_hidden_states=True).hidden_states
        states: Tensor = ids
        for block in plan_blocks(range(4), (2, 4), 4):
            module = BlockModule(plan, block).eval()
            states = module(states)
            torch.testing.assert_close(states, expected[block.target])
    trained, whole = dict(module.trained()), dict(teacher.named_parameters())
    assert all(torch.equal(weight, whole[name]) for name, weight in trained.items())
    assert {name for name in trained if ".layers." not in name} == {"model.norm.weight"}


def test_neither_padding_nor_masks_count(store: Path) -> None:
    """Every real position counts, whether it is learned or not; what a batch adds to a sample does not."""
    reader = CacheReader.open(store)
    specs = {layer: reader.find(f"hidden.L{layer}") for layer in range(1, DEPTH + 1)}
    block = plan_blocks(range(DEPTH), range(1, DEPTH + 1), DEPTH)[0]
    order = np.argsort(np.asarray(reader.lengths))
    samples = [int(order[0]), int(order[-1])]
    read = BlockReader(reader, samples, block, specs, None)
    both, alone = read([0, 1]), read([0])
    short, masked = (
        len(reader.read(samples[0]).tokens),
        [reader.read(one).loss_mask.all() for one in range(12)],
    )
    assert not all(masked)
    assert both.weight_BT[0].tolist() == [1.0] * short + [0.0] * (both.weight_BT.shape[1] - short)
    assert both.weight_BT[1].all()
    states_BTD = torch.randn(both.target_BTD.shape)
    for parts in zip(
        relative_errors(states_BTD[:1], both.target_BTD[:1], both.weight_BT[:1]),
        relative_errors(states_BTD[:1, :short], alone.target_BTD, alone.weight_BT),
        strict=True,
    ):
        assert torch.equal(*parts)
    states_BTD[0, short:] = math.nan
    assert relative_errors(states_BTD, both.target_BTD, both.weight_BT)[0].isfinite()


def test_a_kill_anywhere_and_the_same_command_give_the_same_student(
    blockwise: Callable[..., dict[str, Any]], distily_train: Run, store: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--bitnet-conversion", "subln", "--blockwise-steps", 20)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    blockwise(store, *flags, out=straight)
    moments = ("states-001.bin", "block-001.json", "states-003.bin")
    run_module(
        "tests.student.killed", out, ",".join(moments), "from-cache", store, "--output-dir", out, *flags
    )
    code, _, err = distily_train(store, "--output-dir", out, *flags, "--seed", 7)
    assert code == 2
    assert "--seed: the blocks in" in err
    assert "were made with 42, and this run has 7" in err
    blockwise(store, *flags, out=out)
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_processes_share_blocks_that_read_the_teachers_states(
    store: Path, deep: Path, tmp_path: Path
) -> None:
    """Each block is trained by one of them, to the same weights as by one alone."""

    def run(out: Path) -> BlockwiseRun:
        flags = (*FLAGS[:-1], "--blockwise-inputs", "teacher", "--disable-tqdm", "True")
        prepared = prepare(parse([str(store), "--output-dir", str(out), *map(str, flags)]))
        assert prepared.blockwise is not None
        return BlockwiseRun(prepared.blockwise, prepared.request.training)

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    files = run(alone).train(overwrite=False)
    two = [run(shared) for _ in range(2)]
    two[0].open_folder(overwrite=False)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda one: one.train(overwrite=False), two))
    assert made[0] == made[1]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in made[0]]
    assert not list((alone / "blockwise").glob("states*"))


def test_cheap_captures(
    refused: Callable[..., str], blockwise: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Every second layer, in 4 bits, at a part of the positions; a student of some of the layers."""
    teacher, data = teachers.llama(tmp_path / "teacher", layers=DEPTH), tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": teachers.text_of(40, seed)}) for seed in range(24)))
    store = tmp_path / "store"
    layers = ("--hidden-layers", 2, "--final")
    generate(teacher, data, store, *layers, "--hidden-dtype", "int4", "--hidden-positions", 0.4)
    summary = blockwise(store, "--student-model-config", '{"num_hidden_layers": 3}')
    blocks = summary["blockwise"]["blocks"]
    assert [block["layers"] for block in blocks] == [[0], [1, 2]]
    assert all(block["error_after"] < 0.95 * block["error_before"] for block in blocks)
    given = ("--blockwise-inputs", "teacher", "--output-dir", tmp_path / "other", *FLAGS)
    assert "--hidden-layers 2` without --hidden-positions" in refused("from-cache", store, *given)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--student-model-as-bitnet", "False"), "add --student-model-as-bitnet"),
        (("--student", "x"), "--student from a checkpoint; keep one"),
        (
            ("--student-model-config", '{"intermediate_size": 64}'),
            "changes the inner size; use --init teacher",
        ),
        (("--init", "teacher"), "--blockwise-steps has no effect without --init blockwise"),
        (("--blockwise-steps", 0), "--blockwise-steps 0: give 1 or more"),
        (("--blockwise-learning-rate", 0), "--blockwise-learning-rate 0: give a number above 0"),
        (("--student-tokenizer", "TOKENIZER"), "this student has another tokenizer"),
        ((), "--hidden-layers 2` (or every n-th)"),
    ],
)
def test_what_is_refused(
    refused: Callable[..., str],
    cache: Path,
    store: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
    line: str,
) -> None:
    own_bpe(tmp_path / "tokenizer", 257)
    given = [tmp_path / "tokenizer" if flag == "TOKENIZER" else flag for flag in flags]
    said = refused("from-cache", store if flags else cache, "--output-dir", tmp_path / "out", *FLAGS, *given)
    assert line in said
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_packed_are_refused_before_the_blocks(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    teacher = teachers.lfm2(tmp_path / "teacher")
    boundaries = [LogitsSpec(8), HiddenSpec(1, "bf16"), HiddenSpec(2, "bf16")]
    store = write_cache(tmp_path / "store", teacher, random_samples(12, 199), boundaries)
    said = refused("from-cache", store, "--output-dir", tmp_path / "out", *FLAGS, "--pack-rows")
    assert "--pack-rows: Lfm2ForCausalLM" in said
    assert not list((tmp_path / "out").glob("blockwise/*"))


def test_several_stores_are_refused(
    refused: Callable[..., str], deep: Path, store: Path, tmp_path: Path
) -> None:
    other = write_cache(tmp_path / "other", deep, random_samples(36, 199), [LogitsSpec(4)], digest="cd" * 16)
    assert "give one STORE" in refused("from-cache", store, other, "--output-dir", tmp_path / "out", *FLAGS)
