"""Ternary blocks trained one by one, and then together, beside the same student trained as a whole alone.

A student of 6 layers, spread over the demo teacher's 30, with its embeddings and head, which stay as they
are. The cache holds every fifth state in int4 and the final ones, of SAMPLES samples of 256 tokens of the
demo text. float32, AdamW, 2 samples a step. Norms are `subln`, calibrated; the objective is the KL to the
cached distribution. Blocks are trained one by one, then the whole with λ = 1. Without blocks, the student
starts from the teacher's weights, with λ rising over three quarters of the steps (the recipe ternary.yaml
with the KL alone), and has as many steps as take the time of both parts. Time is that of the processor, as
the system counts it for each process, since other work shares the machine.

    python benchmarks/blockwise.py    # what has not run yet, then the page
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from typing import Any

from common import BIN, RUN, table, train, write_result

STEPS, BLOCK_STEPS = int(os.environ.get("STEPS", "200")), int(os.environ.get("BLOCK_STEPS", "200"))
SAMPLES, LENGTH, LAYERS, BATCH = int(os.environ.get("SAMPLES", "400")), 256, 6, 2
STATES = "5,10,15,20,25"
WORK = RUN / "blockwise"
STUDENT = (
    *("--student-model-config", json.dumps({"num_hidden_layers": LAYERS}), "--freeze-embeddings"),
    *("--student-model-as-bitnet", "--bitnet-conversion", "subln"),
    *(
        "--no-bf16",
        "--per-device-train-batch-size",
        str(BATCH),
        "--save-strategy",
        "no",
        "--report-to",
        "none",
    ),
    *("--eval-fraction", "0.1", "--eval-steps", "0.5", "--disable-tqdm", "True"),
)
BLOCKS = ("--init", "blockwise", "--blockwise-steps", str(BLOCK_STEPS))
WARM = ("--bitnet-warmup-weights", "0.75", "--bitnet-warmup-activations", "0.5")


def run(name: str, steps: int, *flags: str) -> dict[str, Any]:
    """One training as a process, kept for the next time."""
    file = WORK / f"{name}.json"
    settings = {"steps": steps, "flags": flags}
    if file.is_file() and (found := json.loads(file.read_text()))["settings"] == json.loads(
        json.dumps(settings)
    ):
        return dict(found)
    before = _processor_seconds()
    summary = train(
        WORK / "students" / name, *STUDENT, "--max-steps", str(steps), *flags, cache=WORK / "cache"
    )
    used = _processor_seconds() - before
    found = {"settings": settings, "processor_seconds": used, "summary": summary}
    file.write_text(json.dumps(found))
    print(f"{name}: {summary['last_eval']}, {used:.0f} s", flush=True)
    return found


def _processor_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare() -> None:
    command = [
        BIN / "distily-cache",
        "generate",
        RUN / "teacher",
        RUN / "topics.jsonl",
        "--out",
        WORK / "cache",
    ]
    command += ["--engine", "transformers", "--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES]
    command += ["--hidden-layers", STATES, "--hidden-dtype", "int4", "--final"]
    subprocess.run([str(word) for word in command], check=True)


def rows() -> list[list[str]]:
    """Of the table, in the order in which they run."""
    rounded = run("rounded", 1, "--learning-rate", "1e-9")
    blocks = run("blocks", 1, "--learning-rate", "1e-9", *BLOCKS)
    shown = [
        _row("the teacher's layers, rounded", rounded, "first_eval", 0),
        _row(f"blocks of {BLOCK_STEPS} steps", blocks, "first_eval", 0),
    ]
    made = float(blocks["processor_seconds"]) - float(rounded["processor_seconds"])
    for rate in ("1e-3", "4e-4"):
        name = f"blockwise-{rate}"
        # The blocks are the same, so they are not trained again.
        there = WORK / "students" / name / "blockwise"
        if not there.is_dir():
            shutil.copytree(WORK / "students" / "blocks" / "blockwise", there)
        whole = run(name, STEPS, "--learning-rate", rate, *BLOCKS)
        shown.append(_row(f"blocks, then {STEPS} steps at {rate}", whole, "last_eval", made))
        if rate == "1e-3":
            each = (float(whole["processor_seconds"]) - float(rounded["processor_seconds"])) / (STEPS - 1)
            steps = STEPS + round(made / each)
            alone = run("whole", steps, "--learning-rate", "4e-3", *WARM)
            shown.append(_row(f"no blocks, {steps} steps at 4e-3, λ over 0.75", alone, "last_eval", 0))
    return shown


def _row(name: str, found: dict[str, Any], when: str, before: float) -> list[str]:
    """before: seconds that were spent on it in another process."""
    measured = found["summary"][when]
    seconds = "" if when == "first_eval" else f"{found['processor_seconds'] + before:,.0f} s"
    error = f" ± {measured['eval_kl_se']:.3f}" if "eval_kl_se" in measured else ""
    return [name, f"{measured['eval_kl']:.3f}{error}", f"{measured['eval_ce']:.3f}", seconds]


def main() -> None:
    if not (WORK / "cache").is_dir():
        prepare()
    found = rows()
    blocks = json.loads((WORK / "blocks.json").read_text())["summary"]["blockwise"]
    errors = [
        [str(one["layers"]), str(one["target"]), f"{one['error_before']:.3f}", f"{one['error_after']:.3f}"]
        for one in blocks["blocks"]
    ]
    about = (__doc__ or "").split("\n\n")[1].replace("SAMPLES", str(SAMPLES))
    body = (
        f"{about}\n\n"
        + table(["student", "held-out KL, nats", "cross-entropy", "processor time"], found)
        + f"\n\nThe blocks, on {blocks['measured_on']}: squared differences to the teacher's states relative "
        + "to their squares.\n\n"
        + table(["student's layers", "teacher's state", "as rounded", "as trained"], errors)
    )
    given = f"SAMPLES={SAMPLES} BLOCK_STEPS={BLOCK_STEPS} STEPS={STEPS} python benchmarks/blockwise.py"
    write_result("blockwise", "Ternary blocks one by one, then together", body, given)


if __name__ == "__main__":
    main()
