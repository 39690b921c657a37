"""How exact is the distribution that `--final` gives back: KL from the teacher's own, by stored type.

Logits of plain transformers in float32 against those of the state behind the final norm, as it is stored, and
the sidecar's LM head, as a reader of the cache computes them. klt4 and klt6 are calibrated on other positions
of the same text.
"""

from __future__ import annotations

import json

import torch
from common import RUN, table, write_result
from transformers import AutoModelForCausalLM

from featurestore.format.codec import decode_hidden
from featurestore.format.sidecar import HeadSpec, Part
from featurestore.format.states import transform
from featurestore.format.states.transform import Basis, decode_transformed, encode_transformed
from pipeline.capture.reduce import encode_hidden
from pipeline.teacher.basis import calibrate_in, fisher
from pipeline.teacher.checkpoint import load_teacher
from pipeline.teacher.tokenizer import load_tokenizer
from pipeline.teacher.weights import plan_sidecar

LENGTH, SAMPLES, OTHERS, CHUNK = 512, 2, 16, 128
TEMPERATURES = (1.0, 2.0)
BITS = {"bf16": torch.uint16, "fp8": torch.uint8}
HEADER = ["stored as", "bytes/token", "mean KL", "largest KL", "mean KL at T=2", "same most likely token"]


def main() -> None:
    teacher = load_teacher(str(RUN / "teacher"))
    lines = (RUN / "topics.jsonl").read_text(encoding="utf-8").splitlines()
    count = (SAMPLES + OTHERS) * LENGTH
    texts = [json.loads(line)["text"] for line in lines]
    ids = load_tokenizer(teacher)("\n".join(texts[: 10 * (SAMPLES + OTHERS)]))["input_ids"][:count]
    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        parts = torch.tensor(ids).reshape(-1, LENGTH).split(2)
        found = torch.cat([model.model(part, use_cache=False).last_hidden_state for part in parts])
        states, others = found[:SAMPLES].flatten(0, 1), found[SAMPLES:].flatten(0, 1)
        exact = model.lm_head(states)
    (part,) = plan_sidecar(teacher, True, ())
    tensors = part.read()
    assert isinstance(part.spec, HeadSpec)
    whole = Part(part.spec, tensors)
    head = torch.from_numpy(tensors["weight"].to_float32())
    rows = []
    for dtype in ("f32", "bf16", "int8", "fp8", "int4", "int2"):
        stored = encode_hidden(states, dtype)
        values = stored.values.view(BITS.get(dtype, stored.values.dtype)).numpy()
        scale = None if stored.scale is None else stored.scale.reshape(-1).numpy()
        again = torch.from_numpy(decode_hidden(values, scale, dtype, states.shape[1]))
        size = values.dtype.itemsize * values.shape[1] + (0 if scale is None else 4)
        rows.append([dtype, f"{size:,}", *measure(exact, again, head)])
    metric = fisher(others.numpy(), whole)
    for dtype in transform.TRANSFORMED:
        rows.append([dtype, *coded(exact, states, head, basis_of(metric, others, dtype))])
    centred = head - head.mean(0)
    gram = (centred.T @ centred).double()
    plain = torch.eye(len(metric), dtype=torch.float64)
    variants = [
        ["klt4", *coded(exact, states, head, basis_of(metric, others, "klt4"))],
        ["klt4, all errors alike", *coded(exact, states, head, basis_of(plain, others, "klt4"))],
        ["klt4, Gram matrix of the head", *coded(exact, states, head, basis_of(gram, others, "klt4"))],
    ]
    for rows_ in (4096, 2048, 1024):
        few = others[:rows_]
        basis = basis_of(fisher(few.numpy(), whole), few, "klt4")
        variants.append([f"klt4, {rows_:,} positions", *coded(exact, states, head, basis)])
    for bits in (2, 3, 5):
        transform.TRANSFORMED["klt4"] = bits
        basis = basis_of(metric, others, "klt4")
        label = f"{bits} bits, {len(basis.decode)} coordinates"
        variants.append([label, *coded(exact, states, head, basis)])
    write_result(
        "final_tier",
        "The full distribution from the final state",
        f"{len(exact):,} positions of the demo text, V={exact.shape[1]:,}, D={states.shape[1]}; the head "
        f"takes {part.size / 1e6:.1f} MB once. KL(exact‖rebuilt) in nats.\nklt4 and klt6 are calibrated on "
        f"{len(others):,} other positions; their basis takes {2 * states.shape[1] ** 2 * 4 / 1e6:.1f} MB "
        "once.\n\n"
        + table(HEADER, rows)
        + "\n\n"
        + NOTES
        + "\n\n"
        + table(["variants of klt4", *HEADER[1:]], variants),
    )


NOTES = """Below, what the basis is made of, how many positions it is calibrated on, and other rates. What
counts is the mean Fisher information of the logits: with all errors alike, or with the Gram matrix of the
head (each token as likely as any other), the same bytes leave twice the KL. A basis wants about 8 positions
for each dimension. The same layout at 2, 3 and 5 bits is not in the product."""


def basis_of(metric: torch.Tensor, states: torch.Tensor, dtype: str) -> Basis:
    spec, tensors = calibrate_in(metric, states.numpy(), dtype)
    values = {name: tensor.values for name, tensor in tensors.items()}
    return Basis(dtype=spec.dtype, counts=spec.counts, digest="", **values)


def coded(exact: torch.Tensor, states: torch.Tensor, head: torch.Tensor, basis: Basis) -> list[str]:
    rows = encode_transformed(states.numpy(), basis)
    again = torch.from_numpy(decode_transformed(rows, basis))
    return [f"{rows.shape[1]:,}", *measure(exact, again, head)]


def measure(exact: torch.Tensor, states: torch.Tensor, head: torch.Tensor) -> list[str]:
    found: dict[float, list[torch.Tensor]] = {temperature: [] for temperature in TEMPERATURES}
    same = 0
    for start in range(0, len(exact), CHUNK):
        chunk = slice(start, start + CHUNK)
        rebuilt = states[chunk] @ head.T
        same += int((rebuilt.argmax(-1) == exact[chunk].argmax(-1)).sum())
        for temperature, kls in found.items():
            p = torch.log_softmax(exact[chunk].double() / temperature, -1)
            q = torch.log_softmax(rebuilt.double() / temperature, -1)
            kls.append((p.exp() * (p - q)).sum(-1))
    one, two = (torch.cat(found[temperature]) for temperature in TEMPERATURES)
    return [f"{one.mean():.1e}", f"{one.max():.1e}", f"{two.mean():.1e}", f"{same / len(exact):.1%}"]


if __name__ == "__main__":
    main()
