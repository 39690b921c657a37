"""Ternary students of the teacher's own shape: what each way of learning leaves of the teacher.

The student has all 30 layers of the demo teacher and its weights; embeddings and head stay as they are. The
text is the first 1,500 characters of each of the demo's documents and of those of Django, Flask, pytest,
Scrapy and Sphinx (BSD and MIT licences, from their source distributions), mixed; a part of the documents is
held out. Samples of 256 tokens, one a step, float32, AdamW, one thread. Each row is one `distily-train
from-cache` with other flags:

- labels: ternary, cross-entropy on the next token alone.
- kd: ternary, from the cached distribution and final states: the recipe examples/recipes/ternary.yaml at a
  quarter of its rate and without its weight decay.
- blockwise: ternary, the recipe examples/recipes/blockwise.yaml: block by block from the cached states first,
  then as kd, but ternary from the first step on, and at lower rates, since it starts from a student that
  works. Each block has 0.6 and the whole 0.5 of the steps that kd has, which takes about the same time where
  there are integer products (VNNI).
- fp: full precision, labels: what learning this text does to the teacher itself.

The table's KL and perplexity are exact, over the whole vocabulary in float32, on samples that no row has
learned from. Continuations are greedy and unedited, of the beginnings of three held-out samples.

    python benchmarks/full_depth.py              # all rows, one after the other, and the page
    python benchmarks/full_depth.py kd           # this row, then the page of all that have run
    python benchmarks/full_depth.py found        # that page alone

STEPS sets the size, and SAMPLES how much of the text is captured (it has 641); the page has all sizes that
have run. A row that is stopped goes on from its last checkpoint, also on another machine that has a copy of
RUN/full_depth.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch
from common import RESULTS, ROOT, RUN, generate, table, train, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from featurestore.reader import CacheReader
from student.data.held_out import split_cache
from student.modeling.saving import load_student

STEPS, SAMPLES = int(os.environ.get("STEPS", "300")), int(os.environ.get("SAMPLES", "640"))
EXCERPT = 1500  # characters of a document
LENGTH, DEPTH, HELD_OUT, MEASURED = 256, 30, 0.03, 48
PROMPTS, PROMPT_LENGTH, CONTINUED = 3, 24, 48
WORK = RUN / "full_depth"
TEXT, CACHE = WORK / "excerpts.jsonl", WORK / "excerpts"
PLOT = "full_depth.svg"
SOURCES = {  # source distributions, their digests, and what of them is documentation
    "Django==5.2.8": (
        "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
        r"docs/(intro|topics|howto|faq|ref)/.*\.txt",
    ),
    "Flask==3.1.2": (
        "bf656c15c80190ed628ad08cdfd3aaa35beb087855e2f494910aa3774cc4fd87",
        r"docs/.*\.rst",
    ),
    "pytest==8.4.2": (
        "86c0d0b93306b961d58d62a4db4879f27fe25513d4b969df351abdddb3c30e01",
        r"doc/en/(explanation/|how-to/|reference/|example/)?[^/]*\.rst",
    ),
    "Scrapy==2.13.3": (
        "bf17588c10e46a9d70c49a05380b749e3c7fba58204a367a5747ce6da2bd204d",
        r"docs/.*\.rst",
    ),
    "Sphinx==8.2.3": (
        "398ad29dee7f63a75888314e9424d40f52ce5a6a87ae88e7071e80af296ec348",
        r"doc/(development|extdev|internals|man|tutorial|usage)/.*\.rst",
    ),
}

RECIPES = ROOT / "examples" / "recipes"
RECIPE = ["--recipe", str(RECIPES / "ternary.yaml")]
# A quarter of the recipe's rate, which drives all 30 layers away from the teacher before they are ternary.
# The rows ran before the recipe had a weight decay, which was not tried at this depth.
RATE = ["--learning-rate", "1e-3", "--bitnet-weight-decay", "0"]
LABELS = ["--logits-loss", "none", "--hidden-loss", "none", "--mapper", "all", "--ce-weight", "1"]
BLOCK_STEPS = round(0.6 * STEPS)
BLOCKWISE = ["--recipe", str(RECIPES / "blockwise.yaml"), "--blockwise-steps", str(BLOCK_STEPS)]
ROWS: dict[str, tuple[str, float, list[str]]] = {  # name, share of STEPS, flags
    "labels": ("ternary, labels", 1.0, [*RECIPE, *RATE, *LABELS]),
    "kd": ("ternary, KD", 1.0, [*RECIPE, *RATE]),
    "blockwise": ("ternary, blockwise + KD", 0.5, BLOCKWISE),
    "fp": (
        "full precision, labels",
        1.0,
        ["--logits-loss", "none", "--ce-weight", "1", "--learning-rate", "1e-4"],
    ),
}


def write_text() -> None:
    """The beginnings of the demo's documents and of those of the sources, one a line, mixed.

    Many short excerpts, since a ternary student learns from different documents and not from much of one.
    """
    if TEXT.is_file():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for line in (RUN / "topics.jsonl").read_text("utf-8").splitlines()]
    for requirement, (digest, names) in SOURCES.items():
        texts += documents(requirement, digest, re.compile(names))
    lines = [json.dumps({"text": text[:EXCERPT]}) for text in texts if len(text) >= EXCERPT]
    random.Random(0).shuffle(lines)
    partial = TEXT.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", "utf-8")
    partial.rename(TEXT)


def documents(requirement: str, digest: str, names: re.Pattern[str]) -> Iterator[str]:
    """The texts of a source distribution whose paths, behind its own folder, are such."""
    folder = WORK / requirement
    pip = ["pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, requirement]
    subprocess.run([sys.executable, "-m", *map(str, pip)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
        sys.exit(f"{archive} is not the {requirement} that the study reads")
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda one: one.name):
            if member.isfile() and names.fullmatch(member.name.partition("/")[2]):
                opened = files.extractfile(member)
                assert opened is not None
                yield opened.read().decode("utf-8")


def capture() -> None:
    layers = ",".join(map(str, range(1, DEPTH)))
    flags = ["--dtype", "float32", "--pack", "--max-seq-len", LENGTH, "--num-samples", SAMPLES, "--final"]
    flags += ["--hidden-layers", layers, "--hidden-dtype", "int4"]
    generate(CACHE, *flags, data=TEXT)


def run(key: str) -> dict[str, Any]:
    """One row, kept for the next time."""
    file, output = WORK / f"{key}-{STEPS}.json", WORK / "students" / f"{key}-{STEPS}"
    if (kept := result(file)) is not None:
        return kept
    if not (output / "summary.json").is_file():
        learn(key, output)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    student = load_student(output)
    found = {
        "settings": settings(),
        "row": key,
        "steps": STEPS,
        "blocks": (BLOCK_STEPS if key == "blockwise" else 0),
        "curve": [
            [LENGTH * one["step"], one["eval_kl"], one["eval_perplexity"]] for one in log if "eval_kl" in one
        ],
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
    with counted(seconds_file(key, STEPS)):
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


def seconds_file(key: str, steps: int) -> Path:
    return WORK / f"{key}-{steps}.seconds"


def result(file: Path) -> dict[str, Any] | None:
    """What a row has come to; None where it has not ended yet or learned from other data."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("settings") == settings() else None


def settings() -> dict[str, Any]:
    """What makes results comparable."""
    return {"manifest": CacheReader.open(CACHE).manifest_digest, "held_out": HELD_OUT, "measured": MEASURED}


@torch.no_grad()
def teacher() -> dict[str, Any]:
    """Its own cross-entropy on the held-out samples, and its continuations."""
    file = WORK / "teacher.json"
    if (kept := result(file)) is not None:
        return kept
    model = load_teacher()
    found: dict[str, Any] = {"settings": settings(), "continued": continue_all(model)}
    found |= measure(model, model)
    file.write_text(json.dumps(found))
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
    unseen = [index for index in range(len(reader)) if index not in learned]
    for index in unseen[:: max(1, len(unseen) // MEASURED)][:MEASURED]:
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


def body(found: list[dict[str, Any]], taught: dict[str, Any]) -> str:
    """The page: the table, the course of the held-out KL, the continuations."""
    rows = [["the teacher", "", "", "", "", "0", f"{math.exp(taught['ce']):.2f}", "0"]]
    for one in found:
        figures = [f"{one['kl']:.3f}", f"{math.exp(one['ce']):.2f}", f"{one['ce'] - taught['ce']:.3f}"]
        seconds = sum(float(line) for line in seconds_file(one["row"], one["steps"]).read_text().split())
        steps = [f"{one['steps']:,}", f"{one['blocks'] or ''}", f"{one['tokens']:,}", f"{seconds:,.0f}"]
        rows.append([ROWS[one["row"]][0], *steps, *figures])
    header = ["", "size", "steps of a block", "tokens of the whole", "seconds", "held-out KL, nats"]
    header += ["perplexity", "cross-entropy above the teacher's"]
    courses = [f"- {_name(one)}: {_course(one['curve'])}" for one in found]
    parts = [
        (__doc__ or "").split("\n", 2)[2].strip(),
        table(header, rows),
        "Size: steps of the rows without blocks. Seconds of one thread's processor time of the command, with "
        f"its evaluations and blocks. Positions that the figures are of: {taught['positions']:,.0f}.",
        *_compared(found, taught),
        f"![Held-out KL and perplexity over tokens]({PLOT})",
        "Held-out KL of the cache's distribution (and perplexity) after so many tokens of the whole student:",
        "\n".join(courses),
    ]
    for place in range(PROMPTS):
        lines = [f"- {_name(one)}: {_code(one['continued'][place][1])}" for one in found]
        lines.insert(0, f"- the teacher: {_code(taught['continued'][place][1])}")
        parts.append(f"{_code(taught['continued'][place][0])} …\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _compared(found: list[dict[str, Any]], taught: dict[str, Any]) -> Iterator[str]:
    """A line for each size that has both rows."""
    left = {(one["row"], one["steps"]): one["ce"] - taught["ce"] for one in found}
    for steps in sorted({one["steps"] for one in found}):
        blocks, kd = left.get(("blockwise", steps)), left.get(("kd", steps))
        if blocks is not None and kd is not None:
            said = "reached" if blocks <= kd / 2 else "**not** reached"
            yield (
                f"At size {steps}, blockwise and KD leave {blocks / kd:.2f} of the distance to the teacher "
                f"in cross-entropy that KD alone leaves; the goal of 0.5 is {said}."
            )


def _name(one: dict[str, Any]) -> str:
    return f"{ROWS[one['row']][0]}, {one['steps']}"


def _course(curve: list[list[float]]) -> str:
    return ", ".join(f"{tokens:,.0f}: {kl:.2f} ({perplexity:,.0f})" for tokens, kl, perplexity in curve)


def plot(found: list[dict[str, Any]], taught: dict[str, Any]) -> None:
    """Held-out KL and perplexity over the tokens of the whole student, which is evaluated as rounded."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "full_depth"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for one in found:
        tokens, kls, perplexities = zip(*one["curve"], strict=True)
        left.plot(tokens, kls, marker="o", ms=3, label=_name(one))
        right.plot(tokens, perplexities, marker="o", ms=3, label=_name(one))
    right.axhline(math.exp(taught["ce"]), color="gray", ls="--", label="the teacher, as in the table")
    left.set(ylabel="held-out KL(teacher‖student), nats", ylim=(0.2, 10))
    right.set(ylabel="held-out perplexity", ylim=(8, 3000))
    for axes in (left, right):
        axes.set(yscale="log", xlabel="tokens that the whole student has learned from")
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / PLOT, metadata={"Date": None})


def _code(text: str) -> str:
    """On one line of Markdown, as it is."""
    return f"<code>{html.escape(json.dumps(text, ensure_ascii=False))}</code>"


def main() -> None:
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write_text()
    capture()
    for key in [word for word in sys.argv[1:] or ROWS if word != "found"]:
        run(key)
    files = [*WORK.glob("*-*.json")]
    order = {key: place for place, key in enumerate(ROWS)}
    found = [one for file in files if (one := result(file)) is not None]
    found.sort(key=lambda one: (one["steps"], order[one["row"]]))
    taught = teacher()
    plot(found, taught)
    write_result("full_depth", "Ternary students of the teacher's own shape", body(found, taught))


if __name__ == "__main__":
    main()
