"""How many bytes a hidden state takes, and how exact the gradients of losses between states are then.

States of a middle layer at 2,048 positions of the demo text, from plain transformers in float32: of the demo
teacher (layer 20 of 30), and of a Llama of another width with random weights (layer 2 of 4). Every type goes
through the encoder of the capture and the store's decoder. The student is far (a model of the teacher's shape
with other random weights) or near (the teacher's states with noise of 10 % of their length).

*States* is the mean over positions of the angle between two gradients of a loss with respect to the
student's state: from what was stored and from the exact states. *Weights* is that between gradients of a
linear map behind the student's states, summed over all positions, as a step of training sums them.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import RESULTS, RUN, table, write_result
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from featurestore.format.kinds.table import kind_of
from featurestore.format.positions import kept_positions
from featurestore.format.schema import HiddenFeatures, HiddenSpec
from featurestore.format.states import transform
from featurestore.format.states.rotated import (
    BLOCK,
    PATTERNS,
    RotatedLayout,
    levels,
    rotate_,
    signs_of,
    unrotate_,
)
from featurestore.format.states.transform import Basis, decode_transformed, encode_transformed
from pipeline.capture.packing import RowLayout, hidden_fields, to_features
from pipeline.capture.spec import CaptureSpec
from pipeline.teacher.basis import calibrate_in
from student.losses import hidden, structure
from student.losses.blocks import BlockPair, StudentBlock
from student.losses.relation_terms import qkv_relation

LENGTH, SAMPLES = 256, 8
NOISE = 0.1
DTYPES = ("bf16", "int8", "fp8", "int4", "int2")
RANKS, RATES, SHARES, SEEDS = (32, 64, 128, 256), (2, 3), (0.5, 0.25, 0.1), 4
SHARED = ("int8", "int4", "int2")
NOTES = """The first positions of a text have states that are a hundred times longer than the others,
most of it in two or three channels. int8 has one scale for all of a state, so that there it keeps
nothing else; int4 and int2 keep these channels apart. At 55 % of the bytes of int8, int4 is therefore closer
to the exact gradient of weights in mse and similarity of the demo, and at about twice the angle in cosine
and relations.

int2 takes 30 % of the bytes of int8. It loses a quarter to a third of each state's length, but what it
loses is about as often one way as the other: its scale is unbiased, and its signs differ from position to
position. In the gradient of weights, which a step sums over positions, little is left of it. A quantiser with
least error has no such scale, and makes the same error wherever a token comes again: main directions by
reverse water-filling (what rate-distortion theory asks for) have a smaller error at as many bytes, and
bend the gradient of weights more. int2 is not for losses that compare states with each other by projections
(relations), nor for a student that is near.

A near student is the worst case on purpose. Its distance to the teacher is noise of 10 % that differs
at each position, so that the exact gradient of weights is a sum of noise, too, and an error of 5 to 9 %
of the state is nearly as large as what is to be learned. bf16 is for such students.

A share of the positions adds the noise of a smaller sample, which falls with the number of positions in
a step (2,048 here). It is large for the mse of the demo, where a few positions make most of the
gradient.

Main directions of states of single layers (a basis from other positions of the same text, not counted in
the bytes) are not in the product. Where the student is far, 32 of them at 36 bytes bend gradients of
weights less than a share of the positions at as many bytes does; but what they lose is lost at every
position, so that no number of positions makes it good. int4 is closer than 256 of them in every column of
the demo but the mse of a near student."""
# (student [N, D], teacher [N, D]) -> the loss of each position, [N]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A teacher's states [N, D] that are stored, those that a basis is made of, students', and the losses."""

    name: str
    teacher_ND: Tensor
    others_ND: Tensor
    students: dict[str, Tensor]
    losses: dict[str, Loss]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to store: bytes per token, relative error, and degrees by (student, loss): states, weights."""

    family: str
    label: str
    size: float
    error: float
    angles: dict[tuple[str, str], tuple[float | None, float]]


def tokens() -> Tensor:
    """int64 [2 SAMPLES, LENGTH] of the demo text."""
    tokenizer = AutoTokenizer.from_pretrained(RUN / "teacher")
    lines = (RUN / "topics.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer("\n".join(json.loads(line)["text"] for line in lines[:60]))["input_ids"]
    return torch.tensor(ids[: 2 * SAMPLES * LENGTH]).view(2 * SAMPLES, LENGTH)


@torch.no_grad()
def states_of(model: Any, ids_BT: Tensor, layer: int) -> Tensor:
    """What goes into block `layer`, float32 [N, D]."""
    model.model.layers, kept = model.model.layers[:layer], model.model.layers
    model.model.norm, norm = torch.nn.Identity(), model.model.norm
    parts = [model.model(part, use_cache=False).last_hidden_state for part in ids_BT.split(4)]
    model.model.layers, model.model.norm = kept, norm
    return torch.cat(parts).flatten(0, 1).clone()


def settings() -> Iterator[Setting]:
    ids = tokens()
    demo = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.float32).eval()
    small = LlamaConfig(
        vocab_size=demo.config.vocab_size,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    for name, config, layer in (("demo", demo.config, 20), ("random", small, 2)):
        torch.manual_seed(0)
        made = [AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2)]
        teacher = demo if name == "demo" else made[0]
        states = states_of(teacher, ids, layer)
        exact, others = states.split(SAMPLES * LENGTH)
        noise = torch.randn(exact.shape)
        noise *= NOISE * exact.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        students = {"far": states_of(made[1], ids[:SAMPLES], layer), "near": exact + noise}
        yield Setting(
            name=f"{name} (D = {exact.shape[1]})",
            teacher_ND=exact,
            others_ND=others,
            students=students,
            losses=losses_of(teacher.model.layers[layer]),
        )


def losses_of(block: torch.nn.Module) -> dict[str, Loss]:
    """The losses by name; block: the teacher's, whose projections both sides share."""

    def similarity(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        return structure.similarity(student_ND, teacher_ND, [LENGTH] * SAMPLES)

    def relation(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        sides = [side.view(SAMPLES, LENGTH, -1) for side in (student_ND, teacher_ND)]
        blocks: Any = (StudentBlock(block), StudentBlock(block))
        return qkv_relation(BlockPair(blocks, sides[0], sides[1], None)).flatten()

    return {
        "mse": hidden.mse,
        "cosine": hidden.cosine,
        "similarity": similarity,
        "qkv relation": relation,
    }


def stored(states_ND: Tensor, spec: HiddenSpec) -> Tensor:
    """What the store gives back of states that a capture was given."""
    capture = CaptureSpec.from_groups((spec,), 1)
    layout = RowLayout.of(capture, states_ND.shape[1])
    rows = layout.pack(hidden_fields(spec.layer, states_ND, spec.dtype)).numpy()
    found = to_features(layout.unpack(rows), (spec,), states_ND.shape[1])[spec]
    assert isinstance(found, HiddenFeatures)
    return torch.from_numpy(found.to_float32())


def in_basis(setting: Setting, rank: int) -> Tensor:
    """The teacher's states in the `rank` main directions of other states, in int8 with a scale each."""
    mean_D = setting.others_ND.mean(0)
    basis_Dr = torch.linalg.svd(setting.others_ND - mean_D, full_matrices=False)[2][:rank].T
    coefficients = stored((setting.teacher_ND - mean_D) @ basis_Dr, HiddenSpec(0, "int8"))
    return coefficients @ basis_Dr.T + mean_D


def water_filled(setting: Setting, bits: int) -> tuple[Tensor, int]:
    """The teacher's states in all main directions of other states, with bits by reverse water-filling; bytes.

    The first direction, in which the huge states of first positions lie, is in bfloat16.
    """
    size, others_ND = setting.others_ND.shape[1], setting.others_ND.double()
    first_D1 = torch.linalg.eigh(others_ND.T @ others_ND)[1][:, -1:].float()

    def parts(states_ND: Tensor) -> tuple[Tensor, Tensor]:
        along_ND = (states_ND @ first_D1).bfloat16().float() @ first_D1.T
        return along_ND, states_ND - along_ND

    transform.TRANSFORMED["klt4"] = bits
    rest_ND = parts(setting.others_ND)[1]
    spec, tensors = calibrate_in(torch.eye(size, dtype=torch.float64), rest_ND.numpy(), "klt4")
    arrays = {name: tensor.values for name, tensor in tensors.items()}
    basis = Basis(dtype=spec.dtype, counts=spec.counts, digest="", **arrays)
    along_ND, given_ND = parts(setting.teacher_ND)
    rows = encode_transformed(given_ND.numpy(), basis)
    return torch.from_numpy(decode_transformed(rows, basis)) + along_ND, rows.shape[1] + 2


def gradient(loss: Loss, student_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor | float = 1.0) -> Tensor:
    """Of the weighted sum over positions, with respect to the student's states, [N, D]."""
    leaf = student_ND.clone().requires_grad_()
    (loss(leaf, teacher_ND) * weight_N).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def degrees(one: Tensor, other: Tensor) -> Tensor:
    """Between vectors along the last dimension."""
    cosine = cosine_similarity(one.double(), other.double(), dim=-1).clamp(-1, 1)
    return cosine.arccos().rad2deg()


def angles(setting: Setting, found_ND: Tensor) -> dict[tuple[str, str], tuple[float | None, float]]:
    out: dict[tuple[str, str], tuple[float | None, float]] = {}
    for who, student in setting.students.items():
        for name, loss in setting.losses.items():
            exact, other = (gradient(loss, student, states) for states in (setting.teacher_ND, found_ND))
            weights = degrees((exact.T @ student).flatten(), (other.T @ student).flatten())
            out[who, name] = float(degrees(exact, other).mean()), float(weights)
    return out


def share_angles(
    setting: Setting, found_ND: Tensor, share: float
) -> dict[tuple[str, str], tuple[float | None, float]]:
    """The mean over seeds, of losses of single positions."""
    out: dict[tuple[str, str], tuple[float | None, float]] = {}
    for who, student in setting.students.items():
        for name in ("mse", "cosine"):
            loss, found = setting.losses[name], []
            exact = (gradient(loss, student, setting.teacher_ND).T @ student).flatten()
            for seed in range(SEEDS):
                weight_N = torch.zeros(SAMPLES, LENGTH)
                for number, row in enumerate(weight_N):
                    row[kept_positions(f"{number:032x}", LENGTH, share, seed)] = 1 / share
                other = gradient(loss, student, found_ND, weight_N.flatten()).T @ student
                found.append(float(degrees(exact, other.flatten())))
            out[who, name] = None, float(np.mean(found))
    return out


def measure(setting: Setting) -> list[Point]:
    exact, size = setting.teacher_ND, setting.teacher_ND.shape[1]

    def error(found_ND: Tensor) -> float:
        return float(((found_ND - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())

    points, kept = [], {}
    for dtype in DTYPES:
        spec = HiddenSpec(0, dtype)
        kept[dtype] = found = stored(exact, spec)
        bytes_ = kind_of(spec).row_bytes(spec, size)
        points.append(
            Point(
                family="types",
                label=dtype,
                size=bytes_,
                error=error(found),
                angles=angles(setting, found),
            )
        )
    for rank in RANKS:
        found = in_basis(setting, rank)
        points.append(
            Point(
                family="main directions, int8",
                label=f"rank {rank}",
                size=rank + 4,
                error=error(found),
                angles=angles(setting, found),
            )
        )
    for bits in RATES:
        found, bytes_ = water_filled(setting, bits)
        points.append(
            Point(
                family="main directions, water-filled",
                label=f"main, {bits} bits",
                size=bytes_,
                error=error(found),
                angles=angles(setting, found),
            )
        )
    for dtype in SHARED:
        for share in SHARES:
            spec = HiddenSpec(0, dtype, share)
            points.append(
                Point(
                    family=f"share of positions, {dtype}",
                    label=f"{dtype} at {share:g}",
                    size=kind_of(spec).row_bytes(spec, size),
                    error=error(kept[dtype]),
                    angles=share_angles(setting, kept[dtype], share),
                )
            )
    return points


def variant(states_ND: Tensor, outliers: int, rotated: bool, uniform: bool = False) -> Tensor:
    """int4 with other choices: how many outliers, whether blocks are rotated, equal steps as levels."""
    size = states_ND.shape[1]
    places = states_ND.abs().topk(outliers, dim=-1).indices
    apart = torch.zeros_like(states_ND).scatter(-1, places, states_ND.gather(-1, places).bfloat16().float())
    rest_DN = (states_ND - apart).T.contiguous()
    layout = RotatedLayout("int4", size)
    signs = signs_of(torch.arange(size + PATTERNS), places, layout)
    if rotated:
        rotate_(rest_DN, signs)
    blocks = rest_DN.view(size // BLOCK, BLOCK, -1)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).bfloat16().float()
    codes = torch.arange(16, dtype=torch.float32)
    values = (codes - 7) / 8 if uniform else levels(codes, 4)
    found = values[torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)] * scale
    found_DN = found.reshape(size, -1).contiguous()
    if rotated:
        unrotate_(found_DN, signs)
    return found_DN.T + apart


def variants(setting: Setting) -> str:
    exact = setting.teacher_ND
    size, few = exact.shape[1], exact.shape[1] // 192
    rows = []
    for label, outliers, rotated, uniform in (
        ("blocks alone", 0, False, False),
        ("rotated blocks", 0, True, False),
        ("outliers, blocks", few, False, False),
        ("outliers, rotated blocks, levels in equal steps", few, True, True),
        ("**outliers, rotated blocks (int4)**", few, True, False),
        ("twice as many outliers, rotated blocks", 2 * few, True, False),
    ):
        found = variant(exact, outliers, rotated, uniform)
        relative = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
        rows.append(
            [label, f"{(size // 2 + 2 * size // BLOCK + 4 * outliers) / size:.3f}", f"{relative:.1%}"]
        )
    return table(["int4 made of", "bytes per number", "mean relative error"], rows)


def shown(setting: Setting, points: list[Point]) -> str:
    keys = [(who, name) for who in setting.students for name in setting.losses]
    header = ["stored as", "bytes/token", "error", *(f"{who}: {name}" for who, name in keys)]
    rows = []
    for point in points:
        cells = []
        for key in keys:
            states, weights = point.angles.get(key, (None, math.nan))
            part = "–" if states is None else f"{states:.1f}°"
            cells.append("–" if math.isnan(weights) else f"{part} / {weights:.1f}°")
        rows.append([point.label, f"{point.size:,.0f}", f"{point.error:.1%}", *cells])
    return table(header, rows)


def plot(setting: Setting, points: list[Point]) -> None:
    """benchmarks/results/hidden_bytes.svg: bytes per token against the angle of weights, for each loss."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hidden_bytes"
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(setting.losses), figsize=(13, 6), sharex=True, squeeze=False)
    for line, who in zip(grid, setting.students, strict=True):
        for axes, name in zip(line, setting.losses, strict=True):
            for family in dict.fromkeys(point.family for point in points):
                own = [p for p in points if p.family == family and (who, name) in p.angles]
                own.sort(key=lambda p: p.size)
                sizes, degrees_ = [p.size for p in own], [p.angles[who, name][1] for p in own]
                style = "o" if family == "types" else "o-"
                axes.plot(sizes, degrees_, style, ms=4, lw=1, label=family)
                if family == "types":
                    for point, x, y in zip(own, sizes, degrees_, strict=True):
                        axes.annotate(
                            point.label, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7
                        )
            axes.set(xscale="log", yscale="log", title=f"{name}, student {who}")
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("bytes per token")
    for line in grid:
        line[0].set_ylabel("angle of weights, degrees")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(RESULTS / "hidden_bytes.svg", metadata={"Date": None})


def main() -> None:
    parts = [(__doc__ or "").split("\n", 2)[2].strip(), NOTES]
    for setting in settings():
        points = measure(setting)
        heading = f"## {setting.name}\n\nDegrees, states / weights:"
        parts += [heading, shown(setting, points)]
        if setting.teacher_ND.shape[1] % 192 == 0:
            plot(setting, points)
            parts += ["![bytes per token against angle](hidden_bytes.svg)", variants(setting)]
    write_result(
        "hidden_bytes", "Bytes of a hidden state, and how exact gradients made of it are", "\n\n".join(parts)
    )


if __name__ == "__main__":
    main()
