"""How many bytes a position of the logits group takes, and how exact a gradient made of it is.

20,480 positions of the demo text, exact logits from plain transformers in float32. Every spec goes through
the real reduction, the real store and the reader. The angle is that between the student's LM-head gradient of
the forward KL on what was stored and on the full distribution, summed over the first 4,096 positions; the
student is the teacher without its layers 5, 15 and 25.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, RUN, table, write_result

from featurestore.format.codec import head_mass, narrow_mask, row_starts
from featurestore.format.codes import LogitsCodes
from featurestore.format.plan import split_tasks
from featurestore.format.schema import LogitsFeatures, LogitsSpec, Sample
from featurestore.format.tail import first_draws, row_shifts
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.capture.packing import logit_fields, to_features
from pipeline.capture.reduce import reduce_logits
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import identity_of
from pipeline.teacher.checkpoint import load_teacher
from student.data.batches import pad_logits
from student.data.decoding import decode_targets
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, forward_kl
from student.losses.sparse_pass import sparse_head_loss

LENGTH, SAMPLES, ANGLE_ROWS = 512, 40, 4096
DROPPED_LAYERS = (5, 15, 25)
NAMED = {"fixed": LogitsSpec(50), "default": LogitsSpec(12, 0.7, 16), "small": LogitsSpec(8, 0.5, 12)}
CURVES: dict[str, list[LogitsSpec]] = {
    "top-k only": [LogitsSpec(k) for k in (4, 8, 16, 32, 50, 64, 128)],
    "top-p only (at most 256)": [LogitsSpec(256, p) for p in (0.5, 0.7, 0.8, 0.9, 0.95)],
    "draws only (k=1)": [LogitsSpec(1, tail=m) for m in (8, 12, 16, 24, 32, 48)],
    "head p=0.5, k≤8, and draws": [LogitsSpec(8, 0.5, m) for m in (8, 12, 16, 24, 32)],
    "head p=0.7, k≤12, and draws": [LogitsSpec(12, 0.7, m) for m in (8, 12, 16, 20, 24)],
    "head p=0.8, k≤16, and draws": [LogitsSpec(16, 0.8, m) for m in (4, 8, 12, 16, 24)],
}
# What is computed from the logits; the other specs are cut out of these as the store itself would cut them.
WIDEST = LogitsSpec(256)
CAPTURES = [WIDEST, *(curve[-1] for curve in CURVES.values() if curve[0].tail)]
NOTES = """Bytes are those of the group's files over its positions, metadata included. KL in nats, mean over
positions: of the renormalised head, and of the head with all the rest as one more outcome. *Angle* follows
M·q − p where nothing is drawn, as plain top-k distillation does; the training loss here has a bucket for the
rest instead (last column).

Peers, as measured with their own code on another English text and the same teacher:

| | bytes/token | KL(exact‖stored), nats | rows with mass above 1 | angle |
|---|---|---|---|---|
| DistillKit "budget" (k=50) | 114 | 0.043 | 12 % | 26.7° (exact top-50) |
| DistillKit "recommended" (k=128) | 312 | 0.055 | 1 % | – |
| RS-KD, 50 draws (size as published) | 36 | – | – | 8.1° |

![bytes per token against angle](store_size.svg)"""


@dataclass(frozen=True)
class States:
    """Final states of teacher [N, D] and student [ANGLE_ROWS, D], their head [V, D], token ids [S, T]."""

    teacher_ND: torch.Tensor
    student_nD: torch.Tensor
    head_VD: torch.Tensor
    ids_ST: np.ndarray

    def angle_rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(teacher, student) states of each sample that the angle is taken over."""
        teacher = self.teacher_ND[:ANGLE_ROWS].split(LENGTH)
        yield from zip(teacher, self.student_nD.split(LENGTH), strict=True)


@dataclass(frozen=True)
class Measured:
    """One spec: bytes and ids per position, KLs in nats, share of rows above one, degrees, norm ratio."""

    spec: LogitsSpec
    size: float
    ids: float
    kl: float
    kl_all: float
    above_one: float
    angle: float
    norm: float


@torch.inference_mode()
def final_states() -> States:
    """Run the teacher over the text, and the teacher without some layers over its beginning."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = RUN / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens: list[int] = []
    with (RUN / "topics.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            tokens += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(tokens[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)

    def states(rows: torch.Tensor) -> torch.Tensor:
        parts = [model.model(part, use_cache=False).last_hidden_state for part in rows.split(4)]
        return torch.cat(parts).flatten(0, 1)

    teacher = states(ids)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in DROPPED_LAYERS]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    student = states(ids[: ANGLE_ROWS // LENGTH])
    head = model.lm_head.weight.detach().clone()
    return States(teacher.clone(), student.clone(), head, ids.numpy().astype(np.int32))


def capture(states: States) -> dict[LogitsSpec, list[LogitsFeatures]]:
    """The features of every spec of CURVES, per sample."""
    specs = dict.fromkeys(spec for curve in CURVES.values() for spec in curve)
    out: dict[LogitsSpec, list[LogitsFeatures]] = {spec: [] for spec in specs}
    for ids, hidden in zip(states.ids_ST, states.teacher_ND.split(LENGTH), strict=True):
        logits = hidden @ states.head_VD.t()
        labels = torch.from_numpy(np.append(ids[1:], -1).astype(np.int64))
        shifts = torch.from_numpy(row_shifts(ids, 0, LENGTH, 0))
        wide = {}
        for spec in CAPTURES:
            rows = reduce_logits(
                logits_NV=logits,
                labels_N=labels,
                top_k=spec.top_k,
                top_p=spec.top_p,
                tail=spec.tail,
                shifts_N=shifts,
            )
            wide |= to_features({n: t.numpy() for n, t in logit_fields(rows).items()}, (spec,))
        for spec in specs:
            of = next((c for c in CAPTURES if c.tail and spec.tail and c.top_k == spec.top_k), WIDEST)
            out[spec].append(cut(wide[of], of, spec, ids))
    return out


def cut(wide: LogitsFeatures, of: LogitsSpec, spec: LogitsSpec, ids: np.ndarray) -> LogitsFeatures:
    """What a capture with `spec` gives: fewer draws of the same head, or a narrower head without draws."""
    if wide.tail_ids is not None:
        chosen = first_draws(row_shifts(ids, 0, LENGTH, 0), of.tail, spec.tail)
        return replace(wide, tail_ids=wide.tail_ids[chosen].reshape(-1, spec.tail))
    keep = narrow_mask(wide.counts, wide.logits, wide.lse, spec.top_k, spec.top_p)
    counts = np.add.reduceat(keep, row_starts(wide.counts)[:-1], dtype=np.uint16)
    return replace(wide, counts=counts, ids=wide.ids[keep], logits=wide.logits[keep])


def store(spec: LogitsSpec, given: list[LogitsFeatures], states: States) -> tuple[float, list[LogitsCodes]]:
    """Bytes per position of the group on disk, and the samples as the reader gives them."""
    request = GenerateRequest(teacher="", dataset="", out="", engine="transformers", dtype="float32")
    identity = identity_of(request, load_teacher(str(RUN / "teacher"), False), "-")
    samples = [Sample(ids, np.ones(LENGTH, np.bool_)) for ids in states.ids_ST]
    with tempfile.TemporaryDirectory() as folder:
        made = FeatureStore.create(Path(folder) / "store", identity)
        (task,) = split_tasks([(s.id, LENGTH) for s in samples], SAMPLES * LENGTH)
        made.add_plan([task])
        record = made.write_bundle(task, samples, {spec: given})[0]
        made.publish_manifest()
        reader = CacheReader.open(made.path)
        found = [reader.read_codes(i, [spec]).features[spec] for i in range(len(reader))]
    return record.size / record.rows, [f for f in found if isinstance(f, LogitsCodes)]


def targets_of(codes: LogitsCodes) -> SparseTargets:
    """What training makes of a sample."""
    coded = {name: part[0] for name, part in pad_logits([codes], LENGTH).items()}
    return decode_targets(coded, torch.zeros(LENGTH, dtype=torch.long))


def divergence(exact: LogitsFeatures, kept: LogitsFeatures) -> np.ndarray:
    """[T, 3]: KL of the renormalised head, KL of head and rest, whether the stored mass exceeds one."""
    starts, counts = row_starts(exact.counts)[:-1], exact.counts
    log_p, log_s = (f.logits.astype(np.float64) - np.repeat(f.lse, counts) for f in (exact, kept))
    p_mass, s_mass = (head_mass(f.counts, f.logits, f.lse) for f in (exact, kept))
    cross = np.add.reduceat(np.exp(log_p) * (log_p - log_s), starts)
    head = cross / p_mass - np.log(p_mass / s_mass)
    # Below 1e-7 the rest is the rounding of the exact side's float32.
    p_rest, s_rest = np.maximum(1 - p_mass, 1e-7), np.maximum(1 - s_mass, 1e-7)
    return np.column_stack([head, cross + p_rest * np.log(p_rest / s_rest), s_mass > 1 + 1e-6])


class Gradients:
    """The exact LM-head gradient, summed over the first ANGLE_ROWS positions, and angles to it."""

    def __init__(self, states: States) -> None:
        self.states = states
        self.q_VD = torch.zeros_like(states.head_VD)
        p_VD = torch.zeros_like(states.head_VD)
        for teacher, student in states.angle_rows():
            self.q_VD += (student @ states.head_VD.t()).softmax(-1).t() @ student
            p_VD += (teacher @ states.head_VD.t()).softmax(-1).t() @ student
        self.exact_VD = self.q_VD - p_VD

    def angle(self, found_VD: torch.Tensor) -> tuple[float, float]:
        """(degrees, norm ratio) against the exact gradient."""
        norm, exact = found_VD.norm(), self.exact_VD.norm()
        cosine = float((self.exact_VD * found_VD).sum() / exact / norm)
        return math.degrees(math.acos(min(1.0, cosine))), float(norm / exact)

    def plain(self, samples: list[LogitsCodes]) -> torch.Tensor:
        """With draws q - p^, as all rows sum to one; without, what plain top-k follows: M q - p."""
        sampled = samples[0].draws is not None
        found = self.q_VD.clone() if sampled else torch.zeros_like(self.q_VD)
        for codes, (_, student) in zip(samples, self.states.angle_rows(), strict=False):
            targets = targets_of(codes)
            p_TK = targets.logprob_NK.exp()
            if not sampled:
                q_TV = (student @ self.states.head_VD.t()).softmax(-1)
                found += (q_TV * p_TK.sum(-1, keepdim=True)).t() @ student
            for column in range(p_TK.shape[1]):
                ids_T = targets.ids_NK[:, column]
                found.index_add_(0, ids_T, student * p_TK[:, column : column + 1], alpha=-1)
        return found

    def trained(self, samples: list[LogitsCodes]) -> torch.Tensor:
        """The gradient of the training code itself."""
        weight = self.states.head_VD.clone().requires_grad_()
        for codes, (_, student) in zip(samples, self.states.angle_rows(), strict=False):
            terms = [(forward_kl, 1.0)]
            loss = sparse_head_loss(
                hidden_ND=student,
                weight_VD=weight,
                bias_V=None,
                targets=targets_of(codes),
                terms=terms,
                transform=HeadTransform(),
            )
            loss.total.backward()
        assert weight.grad is not None
        return weight.grad


def measure(
    spec: LogitsSpec, given: list[LogitsFeatures], states: States, gradients: Gradients
) -> tuple[Measured, list[LogitsCodes]]:
    """Store a spec and compare what comes back with what went in."""
    size, found = store(spec, given, states)
    pairs = [(a, b.decode()) for a, b in zip(given, found, strict=True)]
    kl = np.concatenate([divergence(a, b) for a, b in pairs]).mean(0)
    ids = sum(
        len(f.ids) + (0 if f.tail_ids is None else (np.diff(f.tail_ids, axis=1, prepend=-1) != 0).sum())
        for _, f in pairs
    ) / (SAMPLES * LENGTH)
    angle = gradients.angle(gradients.plain(found))
    print(f"{label(spec)}: {size:.1f} bytes, {angle[0]:.2f} degrees", flush=True)
    return Measured(spec, size, float(ids), *map(float, kl), *angle), found


def plot(curves: dict[str, list[Measured]]) -> None:
    """benchmarks/results/store_size.svg: bytes per token against angle, one line per family."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "store_size"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for name, points in curves.items():
        ordered = sorted(points, key=lambda m: m.size)
        axes.plot([m.size for m in ordered], [m.angle for m in ordered], marker="o", ms=4, label=name)
    axes.scatter([36], [8.1], marker="*", s=90, color="black", label="RS-KD, 50 draws", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="bytes per token, all included")
    axes.set_ylabel("gradient angle, degrees")
    bytes_at, degrees_at = [10, 15, 20, 30, 50, 100, 200], [2, 3, 5, 7, 10, 20, 30]
    axes.set_xticks(bytes_at, [str(tick) for tick in bytes_at])
    axes.set_yticks(degrees_at, [f"{tick}°" for tick in degrees_at])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "store_size.svg", metadata={"Date": None})


def label(spec: LogitsSpec) -> str:
    head = f"k={spec.top_k}" if spec.top_p is None else f"p={spec.top_p}, k≤{spec.top_k}"
    return f"{head} + {spec.tail} draws" if spec.tail else head


def main() -> None:
    states = final_states()
    given, gradients = capture(states), Gradients(states)
    measured: dict[LogitsSpec, Measured] = {}
    rows = {}
    for spec, features in given.items():
        m, found = measure(spec, features, states, gradients)
        measured[spec] = m
        for name in (name for name, chosen in NAMED.items() if chosen == spec):
            trained = gradients.angle(gradients.trained(found))[0]
            numbers = (
                f"{m.ids:.1f}",
                f"{m.size:.1f}",
                f"{m.kl:.1e}",
                f"{m.kl_all:.1e}",
                f"{m.above_one:.0%}",
            )
            rows[name] = [name, label(spec), *numbers, f"{m.angle:.1f}°", f"{m.norm:.3f}", f"{trained:.1f}°"]
    RESULTS.mkdir(exist_ok=True)
    plot({name: [measured[spec] for spec in curve] for name, curve in CURVES.items()})
    header = ["", "spec", "ids/token", "bytes/token", "KL head", "KL with rest", "mass > 1", "angle"]
    chosen = table([*header, "norm ratio", "angle in training"], [rows[name] for name in NAMED])
    lines = [
        [name, label(m.spec), f"{m.ids:.1f}", f"{m.size:.1f}", f"{m.angle:.1f}°", f"{m.norm:.3f}"]
        for name, curve in CURVES.items()
        for m in (measured[spec] for spec in curve)
    ]
    every = table(["family", "spec", "ids/token", "bytes/token", "angle", "norm ratio"], lines)
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = "\n\n".join([intro, chosen, NOTES, every])
    write_result("store_size", "Bytes per position, and how exact a gradient made of them is", body)


if __name__ == "__main__":
    main()
