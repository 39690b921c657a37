"""How the student was made: objective, architectures, cache, training, and what the cache saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distily.safety.markdown import command, cut, link, section, table
from distily.units import duration, number, size
from student.losses.catalogue import EXACTNESS, Loss, catalogue
from student.report.blocks import HEADER as HEADER_OF_BLOCKS
from student.report.blocks import block_rows, blocks_words
from student.report.files import RunFiles, number_in, rows_in
from student.report.savings import capture_seconds, savings
from student.report.teachers import HEADER, matched, rows, stores

_PAIR_OR_NUMBER = re.compile(r"(_L\d+_to_L\d+)?(_teacher\d+)?(_\d+)?$")  # behind a loss in a label


def objective(run: RunFiles) -> str:
    """The losses with weight, formula and paper."""
    terms = run.summary.get("objective")
    rows = []
    for label, weight in (terms if isinstance(terms, Mapping) else {}).items():
        loss = _loss(str(label))
        rows.append((label, _weight(weight), *(_about(loss) if loss else ("–", "–", "–"))))
    return section(
        "Objective",
        "The student minimised the weighted sum of these, per learned token; p is the teacher's "
        "distribution, q the student's."
        if rows
        else "",
        table(("term", "weight", "formula", "exactness", "source"), rows),
    )


def architectures(run: RunFiles) -> str:
    """Teacher and student beside each other."""
    own, teacher = run.config, run.summary.get("teacher")
    sizes = run.summary.get("teacher_config")
    ternary, share = run.number("sizes", "ternary_parameters"), run.number("sizes", "ternary_share")
    conversion = run.summary.get("bitnet_conversion")
    rows = [
        ("architecture", _word(teacher, "architecture"), _first(own.get("architectures"))),
        ("layers", _count(teacher, "num_layers"), _count(own, "num_hidden_layers")),
        ("hidden size", _count(teacher, "hidden_size"), _count(own, "hidden_size")),
        ("MLP size", _count(sizes, "intermediate_size"), _count(own, "intermediate_size")),
        ("attention heads", _count(sizes, "num_attention_heads"), _count(own, "num_attention_heads")),
        ("key and value heads", _count(sizes, "num_key_value_heads"), _count(own, "num_key_value_heads")),
        ("vocabulary", _count(teacher, "vocab_size"), _count(own, "vocab_size")),
        ("parameters", "–", number(run.number("sizes", "student_parameters"))),
        ("of these ternary", "–", _share(ternary, share)),
        ("norms added for BitNet", "–", str(conversion or "–")),
        ("weights when it was run", _teacher_weights(teacher), "–"),
    ]
    known = [row for row in rows if row[1:] != ("–", "–")]
    return section("Teacher and student", table(("", "teacher", "student"), known))


def blocks(run: RunFiles) -> str:
    """How blocks ended that were trained one by one."""
    rows = [tuple(cell if isinstance(cell, str) else number(cell) for cell in row) for row in block_rows(run)]
    return section("Blocks", blocks_words(run), table(HEADER_OF_BLOCKS, rows)) if rows else ""


def cache(run: RunFiles) -> str:
    """Identity and size of the cache, and what made it."""
    teacher, cost = run.summary.get("teacher"), run.summary.get("cache_cost")
    groups = cost.get("groups") if isinstance(cost, Mapping) else None
    held = [
        (name, number(number_in(groups, name, "bytes_per_token")), _bytes(number_in(groups, name, "bytes")))
        for name in (groups if isinstance(groups, Mapping) else {})
    ]
    facts = [
        ("teacher", _word(cost, "teacher")),
        ("teacher's digest", _word(teacher, "digest")),
        ("tokenizer's digest", _word(teacher, "tokenizer_digest")),
        ("manifest", _word(run.summary, "manifest")),
        ("engine", f"{_word(cost, 'engine')} {_word(teacher, 'engine_version')}"),
        ("samples", _count(cost, "samples")),
        ("tokens", _count(cost, "tokens")),
    ]
    known = [row for row in facts if row[1].strip("– ")]
    captures = [run.summary, *stores(run)[1:]]
    argvs = [record.get("argv") for one in captures for record in rows_in(one, "captures")]
    made = [command(argv) for argv in argvs if isinstance(argv, list) and argv]
    several = rows(run)
    return section(
        "Caches" if several else "Cache",
        "The teacher was not in the training: what it computed was read from a cache, which a digest names.",
        f"{len(several)} caches taught together. {matched(run)}" if several else "",
        table(HEADER, several) if several else table(("cache", ""), known),
        table(("features", "bytes per token", "on disk"), held),
        "Made by" if made else "",
        *made,
    )


def training(run: RunFiles) -> str:
    """The command, and what it took."""
    words, found = run.summary.get("command"), run.summary.get("environment")
    argv = [str(word) for word in words] if isinstance(words, list) else []
    environment = found if isinstance(found, Mapping) else {}
    seconds = run.number("seconds")
    rows = [
        ("steps", number(run.number("steps"))),
        ("samples", number(run.number("train_samples"))),
        ("positions that are learned", _word(run.summary.get("curriculum"), "said") or "–"),
        ("tokens of both", _word(run.summary.get("tokens_of_both"), "said")),
        ("samples held out", number(run.number("held_out_samples"))),
        ("samples left out, for a document that is held out", _unless_zero(run, "left_out_samples")),
        ("samples split one by one, not by document", _unless_zero(run, "samples_of_unknown_documents")),
        ("tokens, with repetitions", number(run.number("tokens"))),
        ("time, with evaluations", "–" if seconds is None else duration(seconds)),
        ("peak memory", _bytes(run.number("peak_rss_bytes"))),
        ("peak memory of the GPU", _bytes(run.number("peak_cuda_bytes"))),
        *((name, value) for name, value in environment.items() if value is not None),
    ]
    return section(
        "Training",
        command(argv) if argv else "",
        "Absolute paths are cut to their last name." if any(cut(word) != word for word in argv) else "",
        table(("training", ""), [row for row in rows if row[1] != "–"]),
    )


def break_even(run: RunFiles) -> str:
    """After how many such students the cache has paid for itself."""
    found, cost = savings([run]), capture_seconds([run])
    if not found or not found[0].saved or not cost:
        return ""
    saved = found[0].saved
    return section(
        "Break-even",
        f"The teacher worked {duration(cost)} for the cache. A live teacher, which computes the tokens of "
        f"every step again, would have worked {duration(saved)} for this student at the same pace: the cache "
        f"pays after {number(cost / saved)} students like it. Evaluations are not counted.",
    )


def _loss(label: str) -> Loss | None:
    """Of a term's label: the loss, perhaps with a pair of layers, a teacher, a number."""
    return catalogue().get(label) or catalogue().get(_PAIR_OR_NUMBER.sub("", label))


def _about(loss: Loss) -> tuple[str, str, str]:
    return loss.formula, f"{EXACTNESS[loss.exactness]}: {loss.statement}", _paper(loss)


def _paper(loss: Loss) -> str:
    if loss.paper is None:
        return "–"
    known = loss.paper.arxiv
    return link(loss.paper.title, f"https://arxiv.org/abs/{known}") if known else loss.paper.title


def _weight(weight: Any) -> str:
    if not isinstance(weight, Mapping):
        return number(number_in({"weight": weight}, "weight"))
    first, last, until = (number(number_in(weight, name)) for name in ("from", "to", "until"))
    return f"{first} to {last} ({weight.get('schedule')}, until {until} of the steps)"


def _teacher_weights(teacher: Any) -> str:
    quantization = _word(teacher, "quantization")
    return _word(teacher, "dtype") + ("" if quantization in ("none", "–") else f", {quantization}")


def _unless_zero(run: RunFiles, name: str) -> str:
    return number(run.number(name) or None)


def _share(ternary: float | None, share: float | None) -> str:
    if ternary == 0:
        return "none"
    return number(ternary) if share is None else f"{share:.1%}"


def _word(found: Any, name: str) -> str:
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) else "–"


def _count(found: Any, name: str) -> str:
    value = number_in(found, name)
    return number(value if value is not None else number_in(found, "text_config", name))


def _first(names: Any) -> str:
    return str(names[0]) if isinstance(names, list) and names else "–"


def _bytes(count: float | None) -> str:
    return "–" if count is None else size(count)
