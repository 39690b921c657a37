"""However many processes train, with whole students or a part of one each, and whichever number goes on after
a kill: the same samples in the same steps, the same losses, and the same student.

Bits are compared where the single process accumulates the gradients of two batches, those that the two
processes get. Then all products are of the same numbers, each gradient is the sum of two in either case, and
the factors between them are 2 and 1/2. Where the two processes accumulate, too, the last of four batches
teaches nothing, so that it does not matter when it is added. Only the norm of all gradients is summed up in
another order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from featurestore.reader import CacheReader
from student.config.parser import parse
from student.training.resume import check_order
from tests.student import fed
from tests.student.exports import Export
from tests.student.splits import split_samples

ROOT = Path(__file__).parents[2]
BATCH, STEPS, SAVED, HELD = 10, 10, 6, 7
HELD_OUT = 0.25
STUDENT = ("--student-model-config", '{"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}')
STUDENT += ("--init", "random", "--hidden-loss", "mse", "--projector", "linear", "--report-to", "none")
STUDENT += ("--eval-fraction", str(HELD_OUT))
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")

# The students whose bits are compared, and what a run of theirs is called: <name>-one of one process that
# accumulates; <name>-ddp and <name>-fsdp of two; <name>-to-one and <name>-to-two resumed by as many from the
# middle of <name>-fsdp and <name>-one.
SGD = ("--optim", "sgd", "--learning-rate", "1", "--lr-scheduler-type", "constant")
BEST = ("--eval-strategy", "steps", "--eval-steps", "2", "--eval-on-start", "True")
BEST += ("--load-best-model-at-end", "--metric-for-best-model", "loss")
ACCUMULATED = ("--train-samples", "15")  # three batches of the four that a step has room for
TERNARY = ("--student-model-as-bitnet", "--bitnet-conversion", "subln")
RATE = ("--bitnet-learning-rate", "0.02")
COMPARED = {
    "fp": ("--hidden-loss", "mse", "--projector", "linear", "--gradient-checkpointing", *BEST, *ACCUMULATED),
    "full": (*TERNARY, "--bitnet-warmup-weights", "0.4", "--bitnet-anneal", "0.6", *RATE),
    "int8": (*TERNARY, "--bitnet-backward", "int8", "--bitnet-masters", "bf16"),
    "clipped": ("--max-grad-norm", "0.05", "--max-steps", "1", *SGD),
}
SHORT, MIDDLE, PART = 4, 2, 5  # steps, the one that is resumed from, samples of a batch

Fed = dict[int, list[tuple[str, int]]]  # by step, the samples of the global batch: id, learned tokens


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of these runs of ten steps: `one` process; `two`, with packed rows; `to_two`, two that go
    on from the middle of `one`; `to_one`, two that were killed and one that goes on.
    """
    root = tmp_path_factory.mktemp("ranks")

    def arguments(name: str, processes: int, *more: object) -> list[str]:
        words: list[object] = [cache, "--output-dir", root / name, *STUDENT, *more]
        words += ["--per-device-train-batch-size", BATCH // processes, "--max_steps", STEPS]
        words += ["--save_steps", 3, "--save_total_limit", 9, "--logging_steps", 1]
        words += ["--eval_strategy", "no", "--eval_on_start", "False", "--disable_tqdm", "True"]
        words += ["--learning-rate", 0.01]
        return [str(word) for word in words]

    def compared(name: str, how: str, processes: int, *more: object) -> list[str]:
        words: list[object] = [cache, "--output-dir", root / f"{name}-{how}"]
        words += ["--student-model-config", '{"num_hidden_layers": 2}', "--copy-layers", "last"]
        batches = 4 if set(ACCUMULATED) <= set(COMPARED[name]) else 2
        words += ["--per-device-train-batch-size", PART]
        words += ["--gradient-accumulation-steps", batches // processes]
        words += ["--max_steps", SHORT, "--save_steps", MIDDLE]
        words += ["--logging_steps", 1, "--eval-fraction", HELD_OUT, "--eval_strategy", "no"]
        words += ["--eval_on_start", "False", "--disable_tqdm", "True", "--report-to", "none"]
        words += ["--learning-rate", 0.01, "--max-grad-norm", 0]
        return [str(word) for word in (*words, *COMPARED[name], *more)]

    def middle(run: str) -> tuple[object, ...]:
        return "--resume_from_checkpoint", root / run / f"checkpoint-{MIDDLE}"

    fed.run(arguments("one", 1))
    for name in COMPARED:
        fed.run(compared(name, "one", 1))
    (root / "to_one").mkdir()
    (root / "to_one" / f"hold-{HELD}").touch()
    started = [
        arguments("two", 2, "--pack-rows"),
        arguments("to_two", 2, "--resume_from_checkpoint", root / "one" / f"checkpoint-{SAVED}"),
        *(compared(name, "fsdp", 2, "--fsdp") for name in COMPARED),
        compared("int8", "ddp", 2),
        compared("full", "to-two", 2, "--fsdp", *middle("full-one")),
        arguments("to_one", 2),
    ]
    kill_when_held(started, root / "to_one")
    (root / "to_one" / f"hold-{HELD}").unlink()
    (root / "to_one" / f"checkpoint-{HELD}").mkdir()  # a kill may come while a checkpoint is written, too
    fed.run(arguments("to_one", 1, "--resume_from_checkpoint", "True"))
    fed.run(compared("full", "to-one", 1, *middle("full-fsdp")))
    return root


def kill_when_held(started: list[list[str]], directory: Path) -> None:
    """Run all of `started` in two processes, which are killed once the last run, in `directory`, stands."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCH, "-m", "tests.student.fed", json.dumps(started)]
    with (directory / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    held = [directory / f"held-{rank}" for rank in range(2)]
    while launcher.poll() is None and not all(path.exists() for path in held):
        time.sleep(0.1)
    assert launcher.poll() is None, (directory / "log").read_text()[-3000:]
    for pid in (launcher.pid, *(int(path.read_text()) for path in held)):
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL


def fed_to(directory: Path, processes: int) -> Fed:
    """What the steps that so many processes took were fed, rank by rank."""
    ranks = []
    for rank in range(processes):
        lines = (directory / f"fed-{rank}of{processes}.jsonl").read_text().splitlines()
        ranks.append({step: [tuple(one) for one in batch] for step, batch in map(json.loads, lines)})
    return {step: [one for rank in ranks for one in rank[step]] for step in ranks[0]}


def logs(directory: Path) -> list[dict[str, float]]:
    """Trainer's log of each step, and of the evaluation at the end."""
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry]


def test_every_step_is_fed_the_same_samples(runs: Path) -> None:
    """In the same order, also in an epoch that a run resumes in its middle."""
    one = fed_to(runs / "one", 1)
    assert list(one) == list(range(STEPS))
    assert fed_to(runs / "two", 2) == one
    assert fed_to(runs / "to_one", 2) == {step: one[step] for step in range(HELD)}
    for name, processes in (("to_one", 1), ("to_two", 2)):
        assert fed_to(runs / name, processes) == {step: one[step] for step in range(SAVED, STEPS)}


def test_an_epoch_teaches_every_sample_once(runs: Path, cache: Path) -> None:
    """Its last step is filled up with samples that teach nothing, here to all of the second process."""
    reader = CacheReader.open(cache)
    names = [reader.read(index, []).id for index in range(len(reader))]
    training = sorted(names[index] for index in split_samples(names, HELD_OUT).training)
    per_epoch = -(-len(training) // BATCH)
    assert 0 < len(training) % BATCH <= BATCH // 2
    assert per_epoch < SAVED < 2 * per_epoch < STEPS
    steps = fed_to(runs / "one", 1)
    epochs = [
        [one for step in range(start, start + per_epoch) for one in steps[step]] for start in (0, per_epoch)
    ]
    learned = [[name for name, tokens in epoch if tokens] for epoch in epochs]
    assert [sorted(epoch) for epoch in learned] == [training, training] and learned[0] != learned[1]


@pytest.mark.parametrize("name", ["two", "to_two", "to_one"])
def test_every_loss_is_the_same(runs: Path, name: str) -> None:
    """A sum over the N learned tokens of a step rounds by at most N eps, and each step adds to that."""
    tokens = max(sum(tokens for _, tokens in batch) for batch in fed_to(runs / "one", 1).values())
    bound = STEPS * tokens * torch.finfo(torch.float32).eps
    for entry, other in zip(logs(runs / "one"), logs(runs / name), strict=True):
        measured = [key for key in entry if "loss" in key or key in ("grad_norm", "eval_kl", "eval_ce")]
        assert {key: other[key] for key in measured} == pytest.approx(
            {key: entry[key] for key in measured}, rel=bound
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--per-device-train-batch-size", "4"), "4 x 1 processes x 1 accumulated are 4; make them 10"),
        (("--seed", "43"), "--seed 43: "),
        (("--data-seed", "43"), "--data-seed 43: "),
        (("--eval-fraction", "0.5"), "--eval-fraction: "),
    ],
)
def test_going_on_in_another_order_is_refused(
    runs: Path,
    cache: Path,
    distily_train: Callable[..., tuple[int, str, str]],
    changed: tuple[str, str],
    message: str,
) -> None:
    checkpoint = runs / "one" / f"checkpoint-{SAVED}"
    words = [cache, "--output-dir", runs / "refused", *STUDENT, "--per-device-train-batch-size", BATCH]
    words += ["--resume_from_checkpoint", checkpoint, *changed]
    code, _, err = distily_train(*words)
    assert code == 2 and message in err and err.count("\n") == 1
    check_order(parse([str(word) for word in (*words, "--ignore_data_skip")]).training, 1, checkpoint)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Those of the saved student."""
    return dict(load_file(directory / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["fp-fsdp", "full-fsdp", "int8-fsdp", "int8-ddp", "full-to-one", "full-to-two"]
)
def test_the_student_has_the_same_bits(runs: Path, name: str) -> None:
    """And a process that got a part of it, or another number of them, goes on as if nothing had happened."""
    one, other = weights(runs / f"{name.partition('-')[0]}-one"), weights(runs / name)
    assert one.keys() == other.keys()
    assert [each for each in one if not torch.equal(one[each], other[each])] == []


def test_gradients_are_clipped_by_the_norm_of_all(runs: Path) -> None:
    """One step of SGD, whose gradients are multiplied by 0.05 / norm. The norm of N numbers, summed up in
    another order, may differ by a share of delta < N eps. By as much of its step, which is at most as long as
    the steps of all together, may a weight differ, and by its rounding.
    """
    one, two = runs / "clipped-one", runs / "clipped-fsdp"
    norms = [logs(run)[0]["grad_norm"] for run in (one, two)]
    rate, eps = logs(one)[0]["learning_rate"], torch.finfo(torch.float32).eps
    a, b = weights(one), weights(two)
    delta = abs(norms[0] / norms[1] - 1)
    assert norms[0] > 10 * 0.05 and delta < eps * sum(tensor.numel() for tensor in a.values())
    for name in a:
        bound = rate * 0.05 * (delta + 4 * eps) + eps * a[name].abs()
        assert ((a[name] - b[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("name", ["fp", "full", "int8"])
def test_each_process_holds_a_part(runs: Path, name: str) -> None:
    """Of weights and optimizer state, with no ternary weights beside them; inputs are quantised as often as
    by one process.
    """
    whole: fed.Keeps = json.loads((runs / f"{name}-one" / "keeps-0of1.json").read_text())
    parts: list[fed.Keeps] = [
        json.loads((runs / f"{name}-fsdp" / f"keeps-{rank}of2.json").read_text()) for rank in range(2)
    ]
    assert parts[0]["weights"] + parts[1]["weights"] == whole["weights"]
    assert parts[0]["moments"] + parts[1]["moments"] == whole["moments"]
    assert parts[0]["inputs"] + parts[1]["inputs"] == whole["inputs"]
    assert abs(parts[0]["weights"] - parts[1]["weights"]) <= 64  # the odd row of embeddings
    assert [part["ternary"] for part in parts] == [0, 0]
    assert bool(whole["ternary"]) == bool(whole["inputs"]) == (name != "fp")


@pytest.mark.parametrize("name", ["full", "int8"])
def test_ternary_weights_are_measured_over_all_processes(runs: Path, name: str) -> None:
    """Counts are of the same weights. Scales are means of the same N numbers, summed up in halves: they
    differ by less than N eps, as shares of themselves.
    """
    largest = max(tensor.numel() for tensor in weights(runs / f"{name}-one").values())
    bound = largest * torch.finfo(torch.float32).eps
    for one, two in zip(logs(runs / f"{name}-one"), logs(runs / f"{name}-fsdp"), strict=True):
        metrics = {key for key in one if key.startswith("bitnet_")}
        assert {key: two[key] for key in metrics} == {
            key: pytest.approx(one[key], abs=bound) if key == "bitnet_scale_drift" else one[key]
            for key in metrics
        }


@pytest.mark.usefixtures("eager")
def test_a_student_of_several_processes_is_a_student(runs: Path, export: Export) -> None:
    """Whoever loads or exports it reads what a single process would have saved."""
    ids = torch.arange(3, 15)[None]
    students = [runs / "int8-one", runs / "int8-fsdp"]
    loaded = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(ids) for each in students]
    assert torch.equal(loaded[0].logits, loaded[1].logits)
    assert export(students[1], "gguf", "--gguf-type", "Q2_0")["format"] == "gguf"
