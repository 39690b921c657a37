"""Where the time of a capture goes beside the teacher's own prefill, per position, on one thread of a CPU.

Each part of what the worker does after the forward pass runs alone, on real final states of the demo teacher
in bfloat16, as often as its best of several rounds needs; parts that are only found as a difference say so.
What encodes, hashes, syncs and commits a shard runs in a thread beside the teacher's next step, so it costs
the steady state nothing while it is quicker than the prefill. Transport from vLLM's worker is not here: it is
what `capture_speed.py` measures beyond the sum of these.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from capture_speed import LENGTH
from capturing import text_prompts
from common import RUN, table, write_result

from featurestore.format.plan import plan_generation
from featurestore.format.schema import HiddenSpec, LogitsSpec, LseSpec, Sample
from featurestore.store import FeatureStore
from pipeline.capture.packing import RowLayout, distribution_fields, hidden_fields, to_features
from pipeline.capture.spec import CaptureSpec
from pipeline.request.generate import GenerateRequest
from pipeline.request.teacher import identity_of
from pipeline.teacher.checkpoint import load_teacher

SAMPLES, ROUNDS, CHUNK = 8, 5, 512
LAYERS = (HiddenSpec(10, "int8"), HiddenSpec(20, "int8"))
PLAIN = LogitsSpec(64)
HEAD = LogitsSpec(12, 0.7)
DRAWS = LogitsSpec(12, 0.7, 16)
TEMPERATURES = tuple(LseSpec(t) for t in (0.5, 2.0, 4.0))


def micros(step: Callable[[], object]) -> float:
    """Microseconds per position of the best round, after one to warm up."""
    found = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return 1e6 * min(found[1:]) / (SAMPLES * LENGTH)


@torch.inference_mode()
def states() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[np.ndarray]]:
    """LM head [V, D], two residual streams [N, D], final states [N, D] and the samples they are of."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.bfloat16).eval()
    given = text_prompts(RUN / "teacher", RUN / "topics.jsonl", SAMPLES, LENGTH)
    found = [
        model.model(torch.from_numpy(p.astype(np.int64))[None], output_hidden_states=True) for p in given
    ]
    streams = [torch.cat([out.hidden_states[layer.layer][0] for out in found]) for layer in LAYERS]
    return model.lm_head.weight, streams, torch.cat([out.last_hidden_state[0] for out in found]), given


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    head_VD, streams, final_ND, given = states()
    rows = SAMPLES * LENGTH
    following = np.full((SAMPLES, LENGTH), -1, np.int64)
    following[:, :-1] = np.stack(given)[:, 1:]
    labels = torch.from_numpy(following.ravel())
    shifts = torch.rand(rows, dtype=torch.float64)
    chunks = [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]
    logits = [torch.nn.functional.linear(final_ND[chunk], head_VD) for chunk in chunks]

    def reduce(*groups: LogitsSpec | LseSpec) -> float:
        spec = CaptureSpec.from_groups(groups, len(head_VD))
        parts = list(zip(logits, chunks, strict=True))
        return micros(lambda: [distribution_fields(spec, z, labels[c], shifts[c]) for z, c in parts])

    product = micros(lambda: [torch.nn.functional.linear(final_ND[chunk], head_VD) for chunk in chunks])
    plain, head, draws = reduce(PLAIN), reduce(HEAD), reduce(DRAWS)
    everything = reduce(DRAWS, *TEMPERATURES)
    groups = (DRAWS, *TEMPERATURES, *LAYERS)
    spec = CaptureSpec.from_groups(groups, len(head_VD))
    layout = RowLayout.of(spec, final_ND.shape[1])

    def encode() -> dict[str, torch.Tensor]:
        return hidden_fields(10, streams[0], "int8") | hidden_fields(20, streams[1], "int8")

    fields = encode() | {
        name: torch.cat(
            [
                distribution_fields(spec, z, labels[c], shifts[c])[name]
                for z, c in zip(logits, chunks, strict=True)
            ]
        )
        for name in distribution_fields(spec, logits[0], labels[chunks[0]], shifts[chunks[0]])
    }
    packed = layout.pack(fields).numpy().reshape(SAMPLES, LENGTH, -1)
    features = [to_features(layout.unpack(sample), groups) for sample in packed]
    teacher = load_teacher(str(RUN / "teacher"))
    request = GenerateRequest(teacher=str(RUN / "teacher"), dataset="", out="")
    identity = identity_of(request, teacher, "benchmark")
    samples = [Sample(tokens, np.ones(len(tokens), np.bool_)) for tokens in given]

    def commit() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore.create(Path(folder) / "store", identity)
            ids = [(sample.id, LENGTH) for sample in samples]
            (work,) = plan_generation(
                known_tasks={}, committed={}, committed_specs={}, wanted=ids, groups=groups, shard_tokens=rows
            ).work
            store.add_plan([work.task])
            store.write_bundle(work.task, samples, {g: [f[g] for f in features] for g in groups})

    lines = [
        ("worker: the LM head's product", product),
        ("worker: k=64, lse, label, entropy", plain),
        ("worker: default head (k=12, p=0.7), lse, label, entropy", head),
        ("worker: 16 draws from the tail (difference)", draws - head),
        ("worker: lse at three more temperatures (difference)", everything - draws),
        ("worker: two layers to int8, with their error", micros(encode)),
        ("worker: everything into one row of bytes", micros(lambda: layout.pack(fields))),
        (
            "driver: rows of bytes to features",
            micros(lambda: [to_features(layout.unpack(sample), groups) for sample in packed]),
        ),
        ("committing thread: encode, write, sync, hash, publish", micros(commit)),
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    what = f"{rows:,} positions; the best of {ROUNDS} rounds of each."
    body = table(
        ["", "µs per position", "of the LM head"], [[n, f"{t:.0f}", f"{t / product:.2f}"] for n, t in lines]
    )
    write_result("capture_profile", "Where a capture's time goes", f"{intro}\n\n{what}\n\n{body}")


if __name__ == "__main__":
    main()
