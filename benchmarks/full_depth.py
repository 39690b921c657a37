"""Ternary students of the teacher's own shape: what each way of learning leaves of the teacher.

The student has all 30 layers of the demo teacher and its weights; embeddings and head stay as they are. The
text is the demo's, and behind it the documentation of Django 5.2 (BSD licence, from its source distribution);
a part of the documents is held out. Samples of 256 tokens, one a step, float32, AdamW, one thread. Each row
is one `distily-train from-cache` with other flags:

- labels: ternary, cross-entropy on the next token alone.
- kd: ternary, the recipe examples/recipes/ternary.yaml, from the cached distribution and final states.
- blockwise: ternary, block by block from the cached states first (`--init blockwise`), then as kd, but
  ternary from the first step on; so many steps fewer that both take about the same time.
- fp: full precision, labels: what learning this text does to the teacher itself.

The table's KL and perplexity are exact, over the whole vocabulary in float32, on samples that no row has
learned from. Continuations are greedy and unedited, of the beginnings of three held-out samples.

    python benchmarks/full_depth.py              # all rows, one after the other, and the page
    python benchmarks/full_depth.py kd           # this row, then the page of all that have run
    python benchmarks/full_depth.py found        # that page alone

A row that is stopped goes on from its last checkpoint, also on another machine that has a copy of
RUN/full_depth. STEPS and SAMPLES (of the text) set the size.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch
from common import ROOT, RUN, generate, table, train, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.reader import CacheReader
from student.data.held_out import split_cache
from student.modeling.saving import load_student

STEPS, SAMPLES = int(os.environ.get("STEPS", "200")), int(os.environ.get("SAMPLES", "480"))
BLOCK_STEPS = int(os.environ.get("BLOCK_STEPS", "100"))
LENGTH, DEPTH, HELD_OUT = 256, 30, 0.03
PROMPTS, PROMPT_LENGTH, CONTINUED = 3, 24, 48
WORK = RUN / "full_depth"
TEXT, CACHE = WORK / "text.jsonl", WORK / "cache"
DJANGO = "Django==5.2.8"
DJANGO_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
FOLDERS = ("intro", "topics", "howto", "faq", "ref")

RECIPE = ["--recipe", str(ROOT / "examples" / "recipes" / "ternary.yaml")]
# A quarter of the recipe's rate, which drives all 30 layers away from the teacher before they are ternary.
RATE = ["--learning-rate", "1e-3"]
AT_ONCE = ["--bitnet-warmup-weights", "0", "--bitnet-warmup-activations", "0"]
LABELS = ["--logits-loss", "none", "--hidden-loss", "none", "--mapper", "all", "--ce-weight", "1"]
BLOCKWISE = ["--init", "blockwise", "--blockwise-steps", str(BLOCK_STEPS)]
ROWS: dict[str, tuple[str, float, list[str]]] = {  # name, share of STEPS, flags
    "labels": ("ternary, labels", 1.0, [*RECIPE, *RATE, *LABELS]),
    "kd": ("ternary, KD", 1.0, [*RECIPE, *RATE]),
    "blockwise": ("ternary, blockwise + KD", 0.5, [*RECIPE, *RATE, *AT_ONCE, *BLOCKWISE]),
    "fp": (
        "full precision, labels",
        1.0,
        ["--logits-loss", "none", "--ce-weight", "1", "--learning-rate", "1e-4"],
    ),
}


def write_text() -> None:
    """The demo's documents and those of Django's documentation, one a line."""
    if TEXT.is_file():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        str(WORK),
        DJANGO,
    ]
    subprocess.run(pip, check=True)
    (archive,) = WORK.glob("[Dd]jango-*.tar.gz")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != DJANGO_SHA256:
        sys.exit(f"{archive} is not the {DJANGO} that the study reads")
    lines = (RUN / "topics.jsonl").read_text("utf-8").splitlines()
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda one: one.name):
            parts = Path(member.name).parts
            if (
                member.isfile()
                and parts[1] == "docs"
                and parts[2] in FOLDERS
                and member.name.endswith(".txt")
            ):
                opened = files.extractfile(member)
                assert opened is not None
                lines.append(json.dumps({"text": opened.read().decode("utf-8")}))
    partial = TEXT.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", "utf-8")
    partial.rename(TEXT)


def capture() -> None:
    layers = ",".join(map(str, range(1, DEPTH)))
    flags = ["--dtype", "float32", "--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES, "--final"]
    flags += ["--hidden-layers", layers, "--hidden-dtype", "int4", "--hidden-positions", 0.25]
    generate(CACHE, *flags, data=TEXT)


def run(key: str) -> dict[str, Any]:
    """One row, kept for the next time."""
    file, output = WORK / f"{key}.json", WORK / "students" / key
    if (kept := result(key)) is not None:
        return kept
    if not (output / "summary.json").is_file():
        learn(key, output)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    student = load_student(output)
    found = {
        "settings": settings(),
        "curve": [[LENGTH * one["step"], one["eval_kl"]] for one in log if "eval_kl" in one],
        "tokens": json.loads((output / "summary.json").read_text())["tokens"],
        **measure(student, load_teacher()),
        "continued": continue_all(student),
    }
    file.with_suffix(".partial").write_text(json.dumps(found))
    file.with_suffix(".partial").rename(file)
    return found


def learn(key: str, output: Path) -> None:
    """The training of a row, from its start or its last checkpoint."""
    _, share, flags = ROWS[key]
    resumed = any(output.glob("checkpoint-*/trainer_state.json"))
    with counted(WORK / f"{key}.seconds"):
        train(
            output,
            *flags,
            *("--freeze-embeddings", "--no-bf16", "--per-device-train-batch-size", "1"),
            *("--max-steps", str(max(1, round(STEPS * share)))),
            *("--save-steps", "50", "--save-total-limit", "1", "--report-to", "none"),
            *("--eval-fraction", str(HELD_OUT), "--eval-steps", "0.25"),
            *(["--resume-from-checkpoint", "True"] if resumed else []),
            cache=CACHE,
        )


@contextmanager
def counted(file: Path) -> Iterator[None]:
    """Adds the processor seconds of the commands in it to the file, where a row that was stopped left its."""
    before = getrusage(RUSAGE_CHILDREN).ru_utime
    try:
        yield
    finally:
        with file.open("a") as lines:
            lines.write(f"{getrusage(RUSAGE_CHILDREN).ru_utime - before:.1f}\n")


def result(key: str) -> dict[str, Any] | None:
    """What a row has come to; None where it has not ended yet or had other settings."""
    file = WORK / f"{key}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("settings") == settings() else None


def settings() -> dict[str, Any]:
    """What makes results comparable."""
    manifest = CacheReader.open(CACHE).manifest_digest
    return {"manifest": manifest, "steps": STEPS, "block_steps": BLOCK_STEPS, "held_out": HELD_OUT}


@torch.no_grad()
def teacher() -> dict[str, Any]:
    """Its own cross-entropy on the held-out samples, and its continuations."""
    if (kept := result("teacher")) is not None:
        return kept
    model = load_teacher()
    found: dict[str, Any] = {"settings": settings(), "continued": continue_all(model)}
    found |= measure(model, model)
    (WORK / "teacher.json").write_text(json.dumps(found))
    return found


def load_teacher() -> Any:
    return AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.float32).eval()


@torch.no_grad()
def measure(student: Any, teacher: Any) -> dict[str, float]:
    """Exact mean KL from the teacher, which runs for it, and cross-entropy, nats per position, on what no
    row learns from.
    """
    reader = CacheReader.open(CACHE)
    learned = set(split_cache(reader, HELD_OUT).training)
    kl = ce = count = 0.0
    for index in set(range(len(reader))) - learned:
        ids_1T = torch.from_numpy(reader.read(index, []).tokens).long()[None]
        p_TV, q_TV = (
            model(input_ids=ids_1T, use_cache=False).logits[0, :-1].log_softmax(-1)
            for model in (teacher, student)
        )
        kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
        ce -= float(q_TV.gather(1, ids_1T[0, 1:, None]).sum())
        count += len(q_TV)
    return {"kl": kl / count, "ce": ce / count, "positions": count}


@torch.no_grad()
def continue_all(model: Any) -> list[tuple[str, str]]:
    """Beginnings of held-out samples and their greedy continuations."""
    tokenizer, reader = AutoTokenizer.from_pretrained(RUN / "teacher"), CacheReader.open(CACHE)
    held_out = split_cache(reader, HELD_OUT).held_out
    told = []
    for index in held_out[:: max(1, len(held_out) // PROMPTS)][:PROMPTS]:
        ids_1T = torch.from_numpy(reader.read(index, []).tokens[:PROMPT_LENGTH].copy()).long()[None]
        asked = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
        all_1T = model.generate(**asked, max_new_tokens=CONTINUED, do_sample=False)
        told.append((tokenizer.decode(ids_1T[0]), tokenizer.decode(all_1T[0, PROMPT_LENGTH:])))
    return told


def body(found: dict[str, dict[str, Any]], taught: dict[str, Any]) -> str:
    """The page: the table, the course of the held-out KL, the continuations."""
    teacher_ce = taught["ce"]
    rows = [["the teacher", "", "", "0", f"{math.exp(teacher_ce):.2f}", "0"]]
    for key, one in found.items():
        figures = [f"{one['kl']:.3f}", f"{math.exp(one['ce']):.2f}", f"{one['ce'] - teacher_ce:.3f}"]
        seconds = sum(float(line) for line in (WORK / f"{key}.seconds").read_text().split())
        rows.append([ROWS[key][0], f"{one['tokens']:,}", f"{seconds:,.0f}", *figures])
    header = ["", "tokens", "seconds", "held-out KL, nats", "perplexity", "cross-entropy above the teacher's"]
    courses = [f"- {ROWS[key][0]}: {_course(one['curve'])}" for key, one in found.items()]
    missing = [name for key, (name, *_) in ROWS.items() if key not in found]
    parts = [
        (__doc__ or "").split("\n", 2)[2].strip(),
        table(header, rows),
        "Seconds of one thread's processor time of the command, with its evaluations and, for blockwise, "
        f"the {BLOCK_STEPS} steps of each block. Not run: {'; '.join(missing) or 'nothing'}.",
    ]
    if {"kd", "blockwise"} <= found.keys():
        left = [found[key]["ce"] - teacher_ce for key in ("blockwise", "kd")]
        said = "reached" if left[0] <= left[1] / 2 else "**not** reached"
        parts.append(
            f"Blockwise and KD leaves {left[0] / left[1]:.2f} of the distance to the teacher in "
            f"cross-entropy that KD alone leaves; the goal of 0.5 is {said}."
        )
    parts += ["Held-out KL, of the cache's distribution, after so many tokens:", "\n".join(courses)]
    told = {"the teacher": taught, **{ROWS[key][0]: one for key, one in found.items()}}
    for place in range(PROMPTS):
        lines = [f"- {name}: {_code(one['continued'][place][1])}" for name, one in told.items()]
        parts.append(f"{_code(taught['continued'][place][0])} …\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _course(curve: list[list[float]]) -> str:
    return ", ".join(f"{tokens:,.0f}: {kl:.2f}" for tokens, kl in curve)


def _code(text: str) -> str:
    """On one line of Markdown, as it is."""
    return f"<code>{html.escape(json.dumps(text, ensure_ascii=False))}</code>"


def main() -> None:
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write_text()
    capture()
    for key in [word for word in sys.argv[1:] or ROWS if word != "found"]:
        run(key)
    found = {key: one for key in ROWS if (one := result(key)) is not None}
    write_result("full_depth", "Ternary students of the teacher's own shape", body(found, teacher()))


if __name__ == "__main__":
    main()
