"""Ternary students against full-precision ones: the same shape, cache, tokens and order of samples.

A student of 4 layers, copied from the teacher's, with the teacher's embeddings and head, which stay as they
are, learns from the demo text (samples of 256 tokens, one a step; float32, AdamW, cosine). Each row is one
`distily-train from-cache` with other flags; the seed chooses the order of the samples.

λ: weights and activations go from full precision to ternary and int8 in the first half of the steps; long λ:
weights in three quarters of them. Rate: a peak learning rate of 4e-3, twice that of the other rows, which is
the one that suited the full-precision student best in a trial of 120 steps. Annealed: Hestia's softmax
(`--bitnet-anneal`), from a λ of a fifth of the steps to rounding at 0.7 of them. Final states: the relative
squared error of the hidden states behind the final norm, beside the KL. Decay: a weight decay of the ternary
matrices alone (0 in all other rows). Relation: `qkv_relation` of one block, its gradient 0.3 times as long as
the KL's.

Curves are the product's own held-out KL (unbiased, from the cache's head and draws) of the fully ternary
student, also while λ < 1; the table's KL and perplexity are exact, over the whole vocabulary in float32, on
all samples that no row has learned from: the held-out ones, and those that are left out since they share a
document with these.

    python benchmarks/ternary.py                # all rows
    python benchmarks/ternary.py subln-warm:0   # this row with this seed, then the page of all that have run
    python benchmarks/ternary.py found          # that page alone
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, RUN, generate, table, train, write_result
from quality_report import shown, spread

from featurestore.format.schema import HiddenSpec
from featurestore.reader import CacheReader
from student.data.held_out import split_cache
from student.modeling.saving import load_student
from student.objective.terms import Objective, term
from student.training.plan import load_teacher

STEPS, SEEDS = int(os.environ.get("STEPS", "400")), range(3)
LENGTH, LAYERS, DEPTH, RELATION_LAYER = 256, 4, 30, 20
HELD_OUT = 0.04
JOBS = int(os.environ.get("JOBS", "2"))  # trainings at a time, of one thread each
WORK = RUN / "ternary"
PLOT = "ternary.svg"

TERNARY = ["--student-model-as-bitnet"]
SUBLN = [*TERNARY, "--bitnet-conversion", "subln"]
LABELS = ["--logits-loss", "none", "--ce-weight", "1"]
WARM = ["--bitnet-warmup-weights", "0.5", "--bitnet-warmup-activations", "0.5"]
RELATION = ["--objective", str(WORK / "relation.yaml")]
HIDDEN = ["--hidden-loss", "nmse", "--layer-map", f"{DEPTH}:{LAYERS}"]
FAST = ["--learning-rate", "4e-3"]
LONG = ["--bitnet-warmup-weights", "0.75", "--bitnet-warmup-activations", "0.5"]
SOFT = ["--bitnet-warmup-weights", "0.2", "--bitnet-anneal", "0.7", "--bitnet-warmup-activations", "0.5"]
OBJECTIVE = {
    "balance": "gradient_norm",
    "terms": [{"loss": "kl", "weight": 1.0}, {"loss": "qkv_relation", "weight": 0.3}],
}
ROWS: dict[str, tuple[str, list[str]]] = {
    "fp": ("full precision, KL", []),
    "fp-rel": ("full precision, KL + relation", RELATION),
    "fp-hidden": ("full precision, KL + final states", HIDDEN),
    "none-ce": ("ternary `none`, labels alone (CE)", [*TERNARY, *LABELS]),
    "none": ("ternary `none`, KL", TERNARY),
    "none-warm": ("ternary `none`, KL, λ", [*TERNARY, *WARM]),
    "none-rel": ("ternary `none`, KL + relation", [*TERNARY, *RELATION]),
    "none-rel-warm": ("ternary `none`, KL + relation, λ", [*TERNARY, *RELATION, *WARM]),
    "subln": ("ternary `subln`, KL", SUBLN),
    "subln-warm": ("ternary `subln`, KL, λ", [*SUBLN, *WARM]),
    "subln-fast": ("ternary `subln`, KL, λ, rate", [*SUBLN, *WARM, *FAST]),
    "subln-long": ("ternary `subln`, KL, long λ, rate", [*SUBLN, *LONG, *FAST]),
    "subln-soft": ("ternary `subln`, KL, annealed, rate", [*SUBLN, *SOFT, *FAST]),
    "subln-final": ("ternary `subln`, KL + final states, long λ, rate", [*SUBLN, *LONG, *FAST, *HIDDEN]),
    "subln-decay": (
        "ternary `subln`, KL + final states, long λ, rate, decay 0.1",
        [*SUBLN, *LONG, *FAST, *HIDDEN, "--bitnet-weight-decay", "0.1"],
    ),
    "subln-decay5": (
        "ternary `subln`, KL + final states, long λ, rate, decay 0.5",
        [*SUBLN, *LONG, *FAST, *HIDDEN, "--bitnet-weight-decay", "0.5"],
    ),
    "subln-decay10": (
        "ternary `subln`, KL + final states, long λ, rate, decay 1",
        [*SUBLN, *LONG, *FAST, *HIDDEN, "--bitnet-weight-decay", "1"],
    ),
    "subln-rel": ("ternary `subln`, KL + relation", [*SUBLN, *RELATION]),
    "subln-rel-warm": ("ternary `subln`, KL + relation, λ", [*SUBLN, *RELATION, *WARM]),
}
REPEATED = 3  # of the ternary recipes, the best ones, are trained with all seeds
GOALS = (0.85, 0.70)  # shares of the gap in KL and in cross-entropy
ALWAYS = ("fp", "none-ce")  # the ends of the gap, too


def run(key: str, seed: int) -> dict[str, Any]:
    """One training as a process, and the exact measurement of its student; kept for the next time."""
    file = WORK / f"{key}-{seed}.json"
    if file.is_file() and (found := json.loads(file.read_text()))["settings"] == settings():
        return found
    began = time.perf_counter()
    output = WORK / "students" / f"{key}-{seed}"
    summary = train(
        output,
        *("--student-model-config", json.dumps({"num_hidden_layers": LAYERS}), "--freeze-embeddings"),
        *("--no-bf16", "--per-device-train-batch-size", "1", "--max-steps", str(STEPS), "--seed", str(seed)),
        *("--learning-rate", "2e-3", "--save-strategy", "no", "--report-to", "none"),
        *("--eval-fraction", str(HELD_OUT), "--eval-steps", "0.125", "--disable-tqdm", "True"),
        *ROWS[key][1],
        cache=WORK / "cache",
    )
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    curve = [[LENGTH * one["step"], one["eval_kl"], one["eval_ce"]] for one in log if "eval_kl" in one]
    measured = subprocess.run(
        [sys.executable, __file__, "measure", str(output)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = {"settings": settings(), "curve": curve, **json.loads(measured.stdout)}
    found |= {"seconds": summary["seconds"], "tokens": summary["tokens"]}
    file.with_suffix(".partial").write_text(json.dumps(found))
    file.with_suffix(".partial").rename(file)
    print(f"{key}, seed {seed}: KL {found['kl']:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return found


@torch.no_grad()
def measure(directory: Path) -> dict[str, float]:
    """Exact mean KL from the teacher and cross-entropy, nats per position, on what no row learns from."""
    reader, student = CacheReader.open(WORK / "cache"), load_student(directory)
    group, head = HiddenSpec(DEPTH), load_teacher(Objective.of((term("full_kl", pair=(0, 0)),)), reader).head
    assert head is not None
    weight_VD = head.weight_VD.float()
    kl = ce = count = 0.0
    learned = set(split_cache(reader, HELD_OUT).training)
    for index in range(len(reader)):
        if index in learned:
            continue
        sample = reader.read(index, [group])
        ids_T = torch.from_numpy(sample.tokens).long()
        states_TD = torch.from_numpy(sample.features[group].values.copy()).view(torch.bfloat16).float()
        p_TV = (states_TD[:-1] @ weight_VD.t()).log_softmax(-1)
        q_TV = student(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
        ce -= float(q_TV.gather(1, ids_T[1:, None]).sum())
        count += len(ids_T) - 1
    return {"kl": kl / count, "ce": ce / count}


def settings() -> dict[str, Any]:
    """What makes results comparable."""
    manifest = CacheReader.open(WORK / "cache").manifest_digest
    return {"manifest": manifest, "steps": STEPS, "layers": LAYERS, "held_out": HELD_OUT, "precision": "fp32"}


def prepare() -> None:
    flags = ["--pack", "--max-seq-len", LENGTH, "--final", "--relation-layers", RELATION_LAYER]
    generate(WORK / "cache", *flags)
    (WORK / "relation.yaml").write_text(json.dumps(OBJECTIVE))


def run_all() -> dict[str, list[dict[str, Any]]]:
    """Every row with the first seed; the ends of the gap and the best ternary rows with all."""
    with ThreadPoolExecutor(JOBS) as pool:
        first = dict(zip(ROWS, pool.map(lambda key: run(key, SEEDS[0]), ROWS), strict=True))
        ternary = [key for key in ROWS if not key.startswith("fp") and key not in ALWAYS]
        best = sorted(ternary, key=lambda key: first[key]["kl"])[:REPEATED]
        again = [(key, seed) for seed in SEEDS[1:] for key in (*ALWAYS, *best)]
        more = list(pool.map(lambda one: run(*one), again))
    found = {key: [first[key]] for key in ROWS}
    for (key, _), result in zip(again, more, strict=True):
        found[key].append(result)
    return found


def kept() -> dict[str, list[dict[str, Any]]]:
    """The rows that have run, with the seeds that have, of those from the first one on."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key in ROWS:
        for seed in SEEDS:
            file = WORK / f"{key}-{seed}.json"
            if not file.is_file() or (one := json.loads(file.read_text()))["settings"] != settings():
                break
            found.setdefault(key, []).append(one)
    return found


def closed(found: dict[str, list[dict[str, Any]]], key: str, what: str) -> list[float]:
    """Share of the gap between plain ternary CE and the full-precision student that a row closes, by seed."""
    ends = zip(found["none-ce"], found["fp"], strict=False)
    return [
        (ce[what] - own[what]) / (ce[what] - fp[what])
        for own, (ce, fp) in zip(found[key], ends, strict=False)
    ]


def body(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for key, runs in found.items():
        kl, perplexity = [one["kl"] for one in runs], [math.exp(one["ce"]) for one in runs]
        gap = [value(closed(found, key, what), 3) for what in ("kl", "ce")]
        seconds = f"{statistics.mean(one['seconds'] for one in runs):.0f}"
        rows.append([ROWS[key][0], str(len(runs)), value(kl, 4), value(perplexity, 1), *gap, seconds])
    header = ["", "seeds", "held-out KL, nats", "perplexity", "of the gap, KL", "of the gap, CE", "seconds"]
    course = [
        [ROWS[key][0], *(f"{statistics.mean(kl):.2f}" for kl in zip(*kls(runs), strict=True))]
        for key, runs in found.items()
    ]
    tokens = [f"{point[0]:,}" for point in found["fp"][0]["curve"]]
    best = max(
        (key for key in found if not key.startswith("fp")),
        key=lambda key: statistics.mean(closed(found, key, "kl")),
    )
    kl, ce = (closed(found, best, what) for what in ("kl", "ce"))
    reached = min(kl) >= GOALS[0] and min(ce) >= GOALS[1]
    missing = [name for key, (name, _) in ROWS.items() if key not in found]
    return "\n\n".join(
        [
            (__doc__ or "").split("\n", 2)[2].strip(),
            table(header, rows),
            "Mean ± standard deviation over seeds, where there are several. Gap: from `none` learning from "
            "labels alone (0) to the student in full precision (1), within a seed. Seconds of one thread "
            "beside another training, evaluations included: not a comparison of speed.",
            f"The best ternary recipe, {ROWS[best][0]}, closes {value(kl, 3)} of the gap in KL and "
            f"{value(ce, 3)} in cross-entropy. The goal, {GOALS[0]} and {GOALS[1]} in each of {len(SEEDS)} "
            + "seeds, is "
            + ("" if reached else "**not** ")
            + f"reached in all that have run ({len(kl)}).",
            f"Not run: {'; '.join(missing) or 'nothing'}.",
            f"![Held-out KL over tokens]({PLOT})",
            table(["held-out KL after tokens", *tokens], course),
        ]
    )


def value(values: Sequence[float], digits: int) -> str:
    return shown(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def kls(runs: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[point[1] for point in one["curve"]] for one in runs]


def plot(found: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out KL over tokens; bars: ± 1 sd over seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ternary"
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for axes, kind in zip(sides, ("none", "subln"), strict=True):
        for key, runs in found.items():
            if key not in ("fp", "none-ce") and not key.startswith(kind):
                continue
            columns = [list(at) for at in zip(*kls(runs), strict=True)]
            tokens = [point[0] for point in runs[0]["curve"]]
            means, bars = [statistics.mean(at) for at in columns], [spread(at) for at in columns]
            style = "--" if key in ("fp", "none-ce") else "-"
            axes.errorbar(
                tokens[1:], means[1:], bars[1:], ls=style, marker="o", ms=3, capsize=2, label=ROWS[key][0]
            )
        axes.set(yscale="log", xlabel="tokens learned from", title=f"conversion {kind}")
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=8)
    sides[0].set(ylabel="held-out KL(teacher‖student), nats")
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / PLOT, metadata={"Date": None})


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["measure"]:
        print(json.dumps(measure(Path(words[1]))))
        return
    prepare()
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for word in words:
        key, _, seed = word.partition(":")
        if key != "found":
            run(key, int(seed))
    found = kept() if words else run_all()
    if not all(end in found for end in ALWAYS):
        sys.exit(f"no page yet: the shares of the gap need the rows {' and '.join(ALWAYS)}")
    plot(found)
    write_result("ternary", "Ternary students against full precision", body(found))


if __name__ == "__main__":
    main()
