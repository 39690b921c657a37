"""How exact is the distribution that `--final` gives back: KL from the teacher's own, by stored type.

Logits of plain transformers in float32 against those of the state behind the final norm, as it is stored, and
the sidecar's LM head, as a reader of the cache computes them.
"""

from __future__ import annotations

import json

import torch
from common import RUN, table, write_result
from transformers import AutoModelForCausalLM

from featurestore.format.codec import decode_hidden
from pipeline.capture.reduce import encode_hidden
from pipeline.teacher.checkpoint import load_teacher
from pipeline.teacher.tokenizer import load_tokenizer
from pipeline.teacher.weights import plan_sidecar

LENGTH, SAMPLES, CHUNK = 512, 2, 128
TEMPERATURES = (1.0, 2.0)
BITS = {"bf16": torch.uint16, "fp8": torch.uint8}


def main() -> None:
    teacher = load_teacher(str(RUN / "teacher"))
    texts = [json.loads(line)["text"] for line in (RUN / "topics.jsonl").read_text().splitlines()]
    ids = load_tokenizer(teacher)("\n".join(texts[: 20 * SAMPLES]))["input_ids"][: SAMPLES * LENGTH]
    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(torch.tensor(ids).reshape(SAMPLES, LENGTH), output_hidden_states=True)
    exact, states = out.logits.flatten(0, 1), out.hidden_states[-1].flatten(0, 1)
    (part,) = plan_sidecar(teacher, True, ())
    head = torch.from_numpy(part.read()["weight"].to_float32())
    rows = []
    for dtype in ("f32", "bf16", "int8", "fp8", "int4"):
        stored = encode_hidden(states, dtype)
        values = stored.values.view(BITS.get(dtype, stored.values.dtype)).numpy()
        scale = None if stored.scale is None else stored.scale.reshape(-1).numpy()
        again = torch.from_numpy(decode_hidden(values, scale, dtype, states.shape[1]))
        size = values.dtype.itemsize * values.shape[1] + (0 if scale is None else 4)
        rows.append([dtype, f"{size:,}", *measure(exact, again, head)])
    write_result(
        "final_tier",
        "The full distribution from the final state",
        f"{len(exact):,} positions of the demo text, V={exact.shape[1]:,}, D={states.shape[1]}; the head "
        f"takes {part.size / 1e6:.1f} MB once. KL(exact‖rebuilt) in nats.\n\n"
        + table(
            ["stored as", "bytes/token", "mean KL", "largest KL", "mean KL at T=2", "same most likely token"],
            rows,
        ),
    )


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
