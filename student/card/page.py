"""The card as Markdown: what a reader needs first comes first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCardData

from distily.safety.markdown import fence, line, section, table, text
from distily.units import number
from student.card.metadata import stock, ternary
from student.card.method import architectures, blocks, break_even, cache, objective, training
from student.card.results import HELD_OUT, Result, results
from student.report.files import RunFiles
from student.report.teachers import matched, stores

_STOCK = """\
from transformers import AutoModelForCausalLM, {tokenizer}

tokenizer = {tokenizer}.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name})
"""
_OURS = """\
from distily import load_student
from transformers import {tokenizer}

tokenizer = {tokenizer}.from_pretrained({name})
model = load_student({name})
"""
_GENERATE = """\
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))"""


def card_page(run: RunFiles, data: ModelCardData, plots: Sequence[tuple[str, str]]) -> str:
    """README.md. plots: (file beside it, what it shows)."""
    parts = [
        f"# {text(run.name)}",
        _what(run),
        _use(run),
        _results(run, plots),
        architectures(run),
        blocks(run),
        objective(run),
        cache(run),
        training(run),
        break_even(run),
        _limits(run),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _what(run: RunFiles) -> str:
    cost = run.summary.get("cache_cost")
    name = cost.get("teacher") if isinstance(cost, Mapping) else None
    kind = "BitNet b1.58 student (ternary weights in its linear layers)" if ternary(run) else "student"
    source = f"{len(stores(run))} caches" if stores(run) else "a cache"
    return (
        f"A {kind} of {text(name or 'an unknown teacher')}, distilled with distily-cache from {source} of "
        "the teacher's features."
    )


def _use(run: RunFiles) -> str:
    name = json.dumps(line(run.name))
    kind = "PreTrainedTokenizerFast" if "load_tokenizer_with" in run.summary else "AutoTokenizer"
    snippet = (_STOCK if stock(run) else _OURS).format(name=name, tokenizer=kind) + _GENERATE
    where = f"{text(run.name)} is this folder, or for transformers the name of its repository on the hub."
    if not stock(run):
        where = (
            f"{text(run.name)} is this folder. It has norms that transformers has no place for, and refuses; "
            "distily-cache loads it."
        )
    return section("Use", where, fence(snippet, "python"))


def _results(run: RunFiles, plots: Sequence[tuple[str, str]]) -> str:
    found = results(run)
    rows = [
        (one.dataset, one.label, _score(one.student, one.error), _score(one.teacher, one.teacher_error))
        for one in found
    ]
    exact = str(run.summary.get("held_out_kl"))
    held = any(one.dataset == HELD_OUT and one.metric == "kl" for one in found)
    kinds = {
        "unbiased": "The KL is an unbiased estimate of the full one.",
        "lower bound": "The KL is a lower bound of the full one.",
    }
    if exact.startswith("over the student's"):
        kinds[exact] = f"The KL is {exact}, as its tokenizer is not the teacher's."
    return section(
        "Results",
        table(("measured on", "metric", "student", "teacher"), rows),
        kinds.get(exact, "") if held else "",
        matched(run) if held and stores(run) else "",
        *(f"![{text(shown)}]({file})" for file, shown in plots),
        _source(run, found),
    )


def _source(run: RunFiles, found: Sequence[Result]) -> str:
    """Where the numbers lie, unrounded."""
    if not found:
        return "Nothing was measured: no samples were held out and `distily-train eval` was not run."
    if run.evaluation:
        return "The numbers are those of `eval.json` and `summary.json`, which also say how they were made."
    return "The numbers are those of the last evaluation in `summary.json`; `distily-train eval` was not run."


def _score(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def _limits(run: RunFiles) -> str:
    points = [
        "It learned to imitate its teacher on the samples of one cache, and has the teacher's faults and "
        "biases. Nothing here says how it does on other text than what is listed under Results.",
        "It was not tested for safety, and follows instructions only as far as the samples teach it.",
        "The teacher's licence and that of the data may bind what is distilled from them.",
    ]
    if ternary(run):
        points.append(
            "The files hold the latent weights, which are rounded to ternary ones when the model runs: they "
            "are not small. `distily-train export` writes packed ones."
        )
    return section("Limits", "\n".join(f"- {point}" for point in points))
