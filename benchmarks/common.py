"""What the studies share: where things are, running a training, writing a result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distily.system.machine import cpu_name

ROOT = Path(__file__).parents[1]
RUN = ROOT / os.environ.get("RUN", "run")
RESULTS = ROOT / "benchmarks" / "results"
BIN = Path(sys.executable).parent

STUDENT = ("--student-model-config", '{"num_hidden_layers": 6}', "--student-model-as-bitnet")
TRAINING = (
    "--bf16",
    "--per-device-train-batch-size",
    "4",
    "--learning-rate",
    "1e-3",
    "--save-strategy",
    "no",
)


def train(output_dir: Path, *flags: str, cache: Path = RUN / "cache") -> dict[str, Any]:
    """Run `distily-train from-cache` as a process of its own; returns its summary."""
    command = [
        str(BIN / "distily-train"),
        "from-cache",
        str(cache),
        "--output-dir",
        str(output_dir),
        "--json",
    ]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def generate(
    out: Path, *flags: object, teacher: Path = RUN / "teacher", data: Path = RUN / "topics.jsonl"
) -> None:
    """Run `distily-cache generate` as a process of its own, which adds what the store lacks."""
    command = [BIN / "distily-cache", "generate", teacher, data, "--out", out, "--engine", "transformers"]
    subprocess.run([*map(str, command), *map(str, flags)], check=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(name: str, title: str, body: str, command: str = "") -> None:
    """Print a result and keep it as benchmarks/results/<name>.md with the command, machine and date.

    command: what made it, where that is not `python benchmarks/<name>.py`.
    """
    made_by = command or f"python benchmarks/{name}.py"
    text = (
        f"# {title}\n\n`{made_by}` on {cpu_name()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}.\n\n{body}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
