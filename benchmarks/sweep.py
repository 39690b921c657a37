"""Eight trainings over the demo cache, killed once and gone on with, while every process is looked at.

Two losses, two rates, with and without hidden states: students of 3 layers in full precision that learn from
12 samples each. `distily-train sweep` is killed (SIGKILL to all its processes) after three runs, and the same
command is given again. Meanwhile its processes are listed twice a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml
from common import BIN, RUN, table, write_result

WORK = RUN / "sweep"
SPEC = {
    "base": {
        "teacher": str(RUN / "teacher"),
        "student-model-config": {"num_hidden_layers": 3},
        "max-steps": 12,
        "save-steps": 6,
        "per-device-train-batch-size": 1,
        "eval-strategy": "no",
        "eval-fraction": 0.05,
        "report-to": "none",
    },
    "grid": {
        "logits-loss": ["kl", "jsd"],
        "learning-rate": [5e-4, 2e-3],
        "hidden": {"none": {}, "cosine": {"hidden-loss": "cosine"}},
    },
}
JOBS = os.environ.get("JOBS", "1")


class Seen:
    """What was seen of a session's processes. engines: command lines with vLLM in them or in their memory;
    most: processes at one time.
    """

    def __init__(self, session: int) -> None:
        self.session, self.looks, self.most = session, 0, 0
        self.engines: set[str] = set()

    def look(self) -> None:
        self.looks += 1
        ours = 0
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(entry.name)) != self.session:
                    continue
                ours += 1
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "vllm" in words or "vllm" in (entry / "maps").read_text():
                    self.engines.add(words)
            except (OSError, ValueError):  # it has ended
                continue
        self.most = max(self.most, ours)


def command() -> list[str]:
    spec = WORK / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC, sort_keys=False))
    words = ["sweep", RUN / "cache", spec, "--out", WORK / "out", "--jobs", JOBS]
    return [str(BIN / "distily-train"), *map(str, words)]


def run(kill_after: int | None) -> tuple[Seen, float]:
    """The command to its end, or until so many runs have finished."""
    began = time.perf_counter()
    process = subprocess.Popen(command(), start_new_session=True)
    seen = Seen(process.pid)
    while process.poll() is None:
        seen.look()
        if kill_after is not None and len(finished()) >= kill_after:
            time.sleep(1)  # into the next run
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.5)
    return seen, time.perf_counter() - began


def finished() -> set[str]:
    return {path.parent.name for path in (WORK / "out").glob("runs/*/sweep_run.json")}


def starts() -> dict[str, int]:
    logs = (WORK / "out" / "logs").glob("*.log")
    return {log.stem: log.read_text().count("--- distily-train") for log in logs}


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    first, first_seconds = run(kill_after=3)
    before = finished()
    second, second_seconds = run(None)
    report: dict[str, Any] = json.loads((WORK / "out" / "sweep.json").read_text())
    again = sorted(name for name in before if starts()[name] != 1)
    engines = first.engines | second.engines
    rows = [
        [
            *run["settings"].values(),
            f"{run['metrics']['eval_kl']:.4f}",
            f"{run['metrics']['eval_perplexity']:.1f}",
            f"{run['seconds']:.0f}" + " (resumed)" * run["resumed"],
            f"{run['generation_seconds']:.0f}",
        ]
        for run in report["runs"]
    ]
    header = [*SPEC["grid"], "held-out KL", "perplexity", "seconds", "generation saved, s"]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\n`distily-train sweep run/cache spec.yaml --out out --jobs {JOBS}`, with\n\n"
        f"```yaml\n{yaml.safe_dump(shown(), sort_keys=False).strip()}\n```\n\n{table(header, rows)}\n\n"
        f"The first command ran {first_seconds:.0f} s and was killed with {len(before)} runs finished; the "
        f"second ran {second_seconds:.0f} s. Finished runs that were run again: {len(again)}. The sweep's "
        f"processes, up to {max(first.most, second.most)} at a time, were looked at "
        f"{first.looks + second.looks} times; with vLLM in their command line or their memory: "
        f"{len(engines)}. "
        "That a training holds one model, the student's, and reads of the teacher's weights only those that "
        "it copies is tested in tests/student/test_no_teacher.py.\n\n"
        f"Generation saved: the run's tokens at the pace at which the cache was generated. In all "
        f"{sum(run['generation_seconds'] for run in report['runs']):,.0f} s, beside "
        f"{sum(run['seconds'] for run in report['runs']):,.0f} s of training."
    )
    write_result("sweep", "Eight students from one cache, without a teacher", body)


def shown() -> dict[str, Any]:
    return {**SPEC, "base": {**SPEC["base"], "teacher": "run/teacher"}}


if __name__ == "__main__":
    main()
