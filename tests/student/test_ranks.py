"""However many processes train, and whichever number goes on after a kill: the same samples in the same
steps, and the same losses.
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

from featurestore.reader import CacheReader
from student.config.parser import parse
from student.data.held_out import split_samples
from student.training.resume import check_order
from tests.student import fed

ROOT = Path(__file__).parents[2]
BATCH, STEPS, SAVED, HELD = 10, 10, 6, 7
HELD_OUT = 0.25
STUDENT = ("--student-model-config", '{"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}')
STUDENT += ("--init", "random", "--hidden-loss", "mse", "--projector", "linear", "--report-to", "none")
STUDENT += ("--eval-fraction", str(HELD_OUT))
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")

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

    fed.run(arguments("one", 1))
    (root / "to_one").mkdir()
    (root / "to_one" / f"hold-{HELD}").touch()
    started = [
        arguments("two", 2, "--pack-rows"),
        arguments("to_two", 2, "--resume_from_checkpoint", root / "one" / f"checkpoint-{SAVED}"),
        arguments("to_one", 2),
    ]
    kill_when_held(started, root / "to_one")
    (root / "to_one" / f"hold-{HELD}").unlink()
    (root / "to_one" / f"checkpoint-{HELD}").mkdir()  # a kill may come while a checkpoint is written, too
    fed.run(arguments("to_one", 1, "--resume_from_checkpoint", "True"))
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
