"""Ternary blocks trained one by one, and then together, beside the same student trained as a whole alone.

A student of 6 layers, spread over the demo teacher's 30, with its embeddings and head, which stay as they
are. The cache holds every fifth state in int4 and the final ones, of SAMPLES samples of 256 tokens of the
demo text. float32, AdamW, 2 samples a step. Norms are `subln`, calibrated; the objective is the KL to the
cached distribution. Blocks are trained one by one, then the whole with λ = 1. Without blocks, the student
starts from the teacher's weights, with λ rising over three quarters of the steps (the recipe ternary.yaml
with the KL alone), and has as many steps as were estimated to take the time of both parts. Its layers are
the last six, since the spread ones start worse than a guess there (`--copy-layers auto`). Time is that of
the processor, as the system counts it for each process, since other work shares the machine.

    python benchmarks/blockwise.py    # what has not run yet, then the page
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from common import RUN, generate, table, train, write_result

from featurestore.reader import CacheReader
from student.data.dataset import DistillationDataset
from student.data.held_out import split_cache
from student.data.teacher_weights import load_parts
from student.modeling.saving import load_student

STEPS, BLOCK_STEPS = int(os.environ.get("STEPS", "200")), int(os.environ.get("BLOCK_STEPS", "200"))
SAMPLES, LENGTH, LAYERS, BATCH = int(os.environ.get("SAMPLES", "400")), 256, 6, 2
HELD_OUT = 0.1
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
    *("--eval-fraction", str(HELD_OUT), "--eval-steps", "0.5", "--disable-tqdm", "True"),
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
    flags = ["--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES]
    generate(WORK / "cache", *flags, "--hidden-layers", STATES, "--hidden-dtype", "int4", "--final")


def rows() -> list[list[str]]:
    """Of the table, in the order in which they run."""
    rounded = run("rounded", 1, "--learning-rate", "1e-9")
    blocks = run("blocks", 1, "--learning-rate", "1e-9", *BLOCKS)
    made = float(blocks["processor_seconds"]) - float(rounded["processor_seconds"])
    shown = [
        _row("the teacher's layers, rounded", "rounded", None),
        _row(f"blocks of {BLOCK_STEPS} steps", "blocks", made),
    ]
    # The blocks are the same, so they are not trained again.
    there = WORK / "students" / "blockwise-1e-3" / "blockwise"
    if not there.is_dir():
        shutil.copytree(WORK / "students" / "blocks" / "blockwise", there)
    whole = run("blockwise-1e-3", STEPS, "--learning-rate", "1e-3", *BLOCKS)
    used = float(whole["processor_seconds"])
    shown.append(_row(f"blocks, then {STEPS} steps at 1e-3", "blockwise-1e-3", made + used))
    each = (used - float(rounded["processor_seconds"])) / (STEPS - 1)
    steps = STEPS + round(made / each)
    alone = run("whole", steps, "--learning-rate", "4e-3", *WARM)
    label = f"no blocks, {steps} steps at 4e-3, λ over 0.75"
    shown.append(_row(label, "whole", float(alone["processor_seconds"])))
    return shown


def _row(label: str, name: str, seconds: float | None) -> list[str]:
    file = WORK / f"{name}-measured.json"
    if not file.is_file():
        file.write_text(json.dumps(measure(WORK / "students" / name)))
    measured = json.loads(file.read_text())
    took = "" if seconds is None else f"{seconds:,.0f} s"
    return [label, f"{measured['kl']:.3f} ± {measured['error']:.3f}", f"{measured['ce']:.3f}", took]


@torch.no_grad()
def measure(directory: Path) -> dict[str, float]:
    """Exact mean KL from the teacher and cross-entropy, nats per position, over the samples that no row
    learns from: those held out, and those that share a document with them. error: of the mean over samples.
    """
    reader, student = CacheReader.open(WORK / "cache"), load_student(directory)
    learned = set(split_cache(reader, HELD_OUT).training)
    group = reader.find(f"hidden.L{reader.identity.num_layers}")
    data = DistillationDataset(reader, [group], [i for i in range(len(reader)) if i not in learned])
    head = load_parts(reader, True, ()).head
    assert head is not None
    weight_VD = head.weight_VD.float()
    kls, ces = [], []
    for sample in data:
        ids_T = sample["input_ids"]
        states_TD = sample[f"teacher_hidden_{reader.identity.num_layers}"].float()
        p_TV = (states_TD[:-1] @ weight_VD.t()).log_softmax(-1)
        q_TV = student(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        kls.append(float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()))
        ces.append(-float(q_TV.gather(1, ids_T[1:, None]).mean()))
    return {
        "kl": statistics.fmean(kls),
        "error": statistics.stdev(kls) / len(kls) ** 0.5,
        "ce": statistics.fmean(ces),
        "samples": len(kls),
    }


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
        f"{about} KL and cross-entropy are exact, over the samples that no row has learned from: those held "
        "out, and those left out since they share a document with these.\n\n"
        + table(["student", "KL, nats", "cross-entropy", "processor time"], found)
        + f"\n\nThe blocks, on {blocks['measured_on']}: squared differences to the teacher's states relative "
        + "to their squares.\n\n"
        + table(["student's layers", "teacher's state", "as rounded", "as trained"], errors)
    )
    given = f"SAMPLES={SAMPLES} BLOCK_STEPS={BLOCK_STEPS} STEPS={STEPS} python benchmarks/blockwise.py"
    write_result("blockwise", "Ternary blocks one by one, then together", body, given)


if __name__ == "__main__":
    main()
