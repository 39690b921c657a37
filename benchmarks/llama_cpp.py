"""Does llama.cpp compute an exported student, how large is it, how fast?

    export LLAMA_PYTHON=…                                   a Python that has llama-cpp-python
    export LLAMA_PLAIN=…                                    libraries without vector instructions, for `deep`
    python benchmarks/llama_cpp.py exact STUDENT            logits of every type, sizes of files
    python benchmarks/llama_cpp.py wide STUDENT             a random student of 2048 channels beside it
    python benchmarks/llama_cpp.py speed STUDENT…           on a quiet machine; `wide` is the random one
    python benchmarks/llama_cpp.py report STUDENT…          the table of all that is known
    python benchmarks/llama_cpp.py deep STUDENT…            of full_depth.py, on its held-out text
    python benchmarks/llama_cpp.py beside STUDENT           its speed beside that of the teacher
    python benchmarks/llama_cpp.py deep-report STUDENT…     the page of those

llama.cpp does not quantise activations a token at a time, so it is compared with an emulation of what it does
(llama_cpp_emulation.py), and the emulation with the integer reference. The emulation follows the roundings of
llama.cpp without vector instructions; these commands, in its source, make what LLAMA_PLAIN names:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF \
      -DGGML_SSE42=OFF -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF
    cmake --build build --target llama && export LLAMA_PLAIN=build/bin

Shape letters: B samples, T positions, N tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, RUN, table, write_result
from full_depth import CACHE, HELD_OUT
from full_depth import LENGTH as DEEP_LENGTH
from llama_cpp_emulation import emulate
from torch import Tensor
from torch.nn import functional

from featurestore.reader import CacheReader
from student.data.held_out import split_cache
from student.export.command import export
from student.export.formats import ExportRequest
from student.export.gguf import writing as gguf
from student.export.gguf.types import TYPES
from student.export.source import ExportSource, open_source, read_config
from student.export.verify import compare, logits_of
from student.modeling.plan import StudentPlan
from student.modeling.saving import load_student, save_student

WORK = RUN / "llama_cpp"
SAMPLES, LENGTH = 16, 128
RATES = ("prompt", "new")
GAPS = (0.0, 0.1, 0.2, 0.5)  # least distances of the best two logits, for agreement where the choice is clear
SENTENCE = "The capital of France is Paris in 1789."
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}


def samples(directory: Path) -> list[list[int]]:
    """The first LENGTH tokens of the first SAMPLES texts that have as many."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = (RUN / "topics.jsonl").read_text(encoding="utf-8").splitlines()
    texts = (tokenizer(json.loads(line)["text"]).input_ids[:LENGTH] for line in lines)
    return list(itertools.islice((one for one in texts if len(one) == LENGTH), SAMPLES))


def held_out() -> list[list[int]]:
    """As many tokens of the cache, in samples of DEEP_LENGTH, that no student has learned from."""
    reader = CacheReader.open(CACHE)
    learned = set(split_cache(reader, HELD_OUT).training)
    others = (reader.read(index, []).tokens.tolist() for index in range(len(reader)) if index not in learned)
    whole = (one for one in others if len(one) == DEEP_LENGTH)
    return list(itertools.islice(whole, SAMPLES * LENGTH // DEEP_LENGTH))


def fitting(directory: Path) -> list[str]:
    """The types whose blocks fit the student's sizes."""
    config = read_config(directory)
    sizes = (config["hidden_size"], config["intermediate_size"])
    return [name for name, kind in TYPES.items() if not any(size % kind.columns for size in sizes)]


def worker(mode: str, tokens: list[list[int]], *paths: Path, libraries: str | None = None) -> dict[str, Any]:
    """What llama_cpp_worker.py prints; with mode "logits" they are under that key, [N, V].

    libraries: where those of llama.cpp are, if not those of llama-cpp-python.
    """
    given = paths[0].with_name("tokens.json")
    given.write_text(json.dumps(tokens))
    script = Path(__file__).with_name("llama_cpp_worker.py")
    command = [os.environ["LLAMA_PYTHON"], "-P", str(script), mode, str(given), *map(str, paths)]
    env = os.environ | ({"LLAMA_CPP_LIB_PATH": str(Path(libraries).absolute())} if libraries else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    result: dict[str, Any] = json.loads(done.stdout)
    if mode == "logits":
        result["logits"] = torch.from_numpy(np.load(given.with_suffix(".npy")))
    return result


def exported(directory: Path, kind: str, dtype: str) -> Path:
    """The GGUF file, made when there is none of these weights."""
    weights = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            weights.update(hashlib.file_digest(opened, "sha256").digest())
    out = WORK / directory.name / f"{kind}-{dtype}-{weights.hexdigest()[:12]}"
    if not out.is_dir():
        export(ExportRequest(directory=directory, format="gguf", out=out, dtype=dtype, gguf_type=kind))
    return out / f"model-{kind}.gguf"


def half_of(path: Path) -> Path:
    """The same model with float16 matrices."""
    out = path.with_suffix(".f16.gguf")
    if not out.is_file():
        worker("half", [], path)
    return out


def teacher_file() -> Path:
    """The teacher with float16 matrices."""
    out = WORK / "teacher"
    if not out.is_dir():
        out.mkdir()
        model = load_student(RUN / "teacher")
        source = ExportSource(RUN / "teacher", read_config(RUN / "teacher"), model)
        gguf.write(source, out, torch.float16, TYPES["Q2_0"])  # of which it has no matrix
    return gguf.file_in(out, TYPES["Q2_0"])


def blocked(directory: Path, kind: str) -> Any:
    """The integer reference, computing in llama.cpp's way."""
    source = open_source(directory)
    gguf.fit(source, torch.float32)
    emulate(source.model, kind)
    return source.model


def emulated(directory: Path, kind: str, ids_BT: Tensor) -> Tensor:
    """Its logits [N, V]."""
    return sample_by_sample(blocked(directory, kind), ids_BT)


def nudged(model: Any) -> Any:
    """The same model with input embeddings that differ by one part in 2^23, up or down by chance."""
    weight_VD = model.get_input_embeddings().weight.data
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = torch.nn.Parameter(weight_VD.clone())  # stays
    signs_VD = torch.randint(0, 2, weight_VD.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight_VD.mul_(1 + signs_VD * 2.0**-23)
    return model


def sample_by_sample(model: Any, ids_BT: Tensor) -> Tensor:
    """Logits [N, V], with the memory of one sample beside them."""
    return torch.cat([logits_of(model, ids_T[None])[0] for ids_T in ids_BT])


def gap(logits_NV: Tensor) -> float:
    """Median distance of the best two logits."""
    return float(gaps(logits_NV).median())


def gaps(logits_NV: Tensor) -> Tensor:
    """Distance of the best two logits, [N]."""
    best_N2 = logits_NV.topk(2).values
    return best_N2[:, 0] - best_N2[:, 1]


def perplexity(logits_NV: Tensor, ids_BT: Tensor) -> float:
    """Of the next tokens of each sample."""
    logits_BTV = logits_NV.view(*ids_BT.shape, -1)
    loss = sum(
        functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum")
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
    )
    return float((loss / ids_BT[:, 1:].numel()).exp())


def relative_error(logits_NV: Tensor, reference_NV: Tensor) -> float:
    """As `compare` has it, without copies of everything in float64."""
    sums = [0.0, 0.0]
    for some_NV, wanted_NV in zip(logits_NV.split(LENGTH), reference_NV.split(LENGTH), strict=True):
        for place, one_NV in enumerate((some_NV.double() - wanted_NV, wanted_NV.double())):
            sums[place] += float((one_NV - one_NV.mean(-1, keepdim=True)).square().sum())
    return math.sqrt(sums[0] / sums[1])


def deep(directory: Path) -> dict[str, Any]:
    """A student of the teacher's shape, on text that it has not learned from: llama.cpp in two builds,
    emulation and integer reference in float32, what one rounding at the start does to the latter two, and how
    clear each position is.
    """
    tokens, kinds = held_out(), fitting(directory)
    ids_BT = torch.tensor(tokens)
    names = [f"{program}, {kind}" for program in ("llama.cpp", "plain llama.cpp") for kind in kinds]
    builds = [None, os.environ["LLAMA_PLAIN"]]
    runs = [
        worker("logits", tokens, exported(directory, kind, "float32"), libraries=build)
        for build in builds
        for kind in kinds
    ]
    logits = {name: run.pop("logits") for name, run in zip(names, runs, strict=True)}
    logits |= {f"emulation, {kind}": emulated(directory, kind, ids_BT) for kind in kinds}
    first = kinds[0]
    logits |= {
        "reference": sample_by_sample(open_source(directory).model, ids_BT),
        "emulation, nudged": sample_by_sample(nudged(blocked(directory, first)), ids_BT),
        "reference, nudged": sample_by_sample(nudged(open_source(directory).model), ids_BT),
    }
    compared = [(f"plain llama.cpp, {kind}", f"emulation, {kind}") for kind in kinds]
    compared += [(f"llama.cpp, {kind}", f"plain llama.cpp, {kind}") for kind in kinds]
    compared += [(f"llama.cpp, {kind}", "reference") for kind in kinds]
    compared += [
        (f"emulation, {first}", "reference"),
        ("emulation, nudged", f"emulation, {first}"),
        ("reference, nudged", "reference"),
    ]
    pairs = {f"{one} = {other}": agreement(logits[one], logits[other]) for one, other in compared}
    best = logits[names[0]].argmax(-1)
    return runs[0] | {
        "plain": runs[-1]["system"],
        "types": kinds,
        "pairs": pairs,
        "perplexity": {
            which: perplexity(some_NV, ids_BT) for which, some_NV in logits.items() if "nudged" not in which
        },
        "distinct": len(set(best.tolist())),
        "positions": len(best),
    }


def agreement(one_NV: Tensor, other_NV: Tensor) -> dict[str, Any]:
    """How often the best tokens are the same, in all and where the other's best two are so far apart."""
    differ_N = one_NV.argmax(-1) != other_NV.argmax(-1)
    clear_N = gaps(other_NV)
    return {
        "relative_error": relative_error(one_NV, other_NV),
        "top1_agreement": float((~differ_N).double().mean()),
        "gap": float(clear_N.median()),
        "gap_where_differ": float(clear_N[differ_N].median()) if differ_N.any() else None,
        "largest_gap_where_differ": float(clear_N[differ_N].max()) if differ_N.any() else None,
        "by_gap": [
            [least, int((clear_N >= least).sum()), float((~differ_N[clear_N >= least]).double().mean())]
            for least in GAPS
        ],
    }


def exact(directory: Path) -> dict[str, Any]:
    """llama.cpp, emulation and integer reference on the same text, with embeddings and head in float32; sizes
    with float16.
    """
    from transformers import AutoTokenizer

    tokens = samples(directory)
    ids_BT = torch.tensor(tokens)
    reference = sample_by_sample(open_source(directory).model, ids_BT)
    kinds = {}
    for name, kind in TYPES.items():
        run = worker("logits", tokens, exported(directory, name, "float32"))
        got, blocked = run.pop("logits"), emulated(directory, name, ids_BT)
        differ = got.argmax(-1) != blocked.argmax(-1)
        kinds[name] = {
            "emulation": compare(got, blocked).__dict__,
            "reference": compare(got, reference).__dict__,
            "blocking": compare(blocked, reference).__dict__,
            "differ": int(differ.sum()),
            "gap": gap(blocked),
            "gap_where_differ": gap(blocked[differ]) if differ.any() else None,
            "tokens": [one.argmax(-1)[-12:].tolist() for one in (reference, blocked, got)],
            "distinct": len(set(got.argmax(-1).tolist())),
            "bytes_per_weight": kind.block_bytes / kind.columns,
            "bytes": exported(directory, name, "float16").stat().st_size,
        }
    own = AutoTokenizer.from_pretrained(directory)(SENTENCE, add_special_tokens=False).input_ids
    half = half_of(exported(directory, "TQ2_0", "float16")).stat().st_size
    return run | {"kinds": kinds, "half_bytes": half, "same_split": run["tokenized"] == own}


def wide(directory: Path) -> None:
    """A random student of WIDE's shape with the tokenizer of another, at WORK/wide."""
    torch.manual_seed(0)
    config = load_student(directory).config
    config.update(WIDE | {"head_dim": 64})
    plan = StudentPlan(
        config=config,
        checkpoint=None,
        layers=[],
        teacher=None,
        conversion="none",
        converted=False,
        masters="fp32",
        freeze_embeddings=False,
    )
    save_student(plan.build()[0], WORK / "wide", directory)
    half_of(exported(WORK / "wide", "TQ2_0", "float16"))


def beside_teacher(directory: Path) -> dict[str, Any]:
    """Tokens per second and bytes of the student in each type and of its teacher with float16 matrices."""
    files = {kind: exported(directory, kind, "float16") for kind in fitting(directory)}
    files["teacher"] = teacher_file()
    found = worker("speed", held_out(), *files.values())
    for one, which in zip(found["rates"], itertools.cycle(files)):
        one["path"] = which  # as the worker goes through its files
    return found | {"bytes": {which: one.stat().st_size for which, one in files.items()}}


def speed(directory: Path) -> dict[str, Any]:
    """Tokens per second of TQ2_0 and float16 matrices, embeddings and head in float16."""
    ternary = exported(directory, "TQ2_0", "float16")
    files = [ternary, half_of(ternary)]
    return worker("speed", samples(directory), *files) | {"bytes": [one.stat().st_size for one in files]}


def shape_of(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    return f"{config['num_hidden_layers']} layers of {config['hidden_size']}/{config['intermediate_size']}"


def kept(directory: Path, stage: str) -> Path:
    return WORK / f"{directory.name}.{stage}.json"


def agreement_table(kinds: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{one['emulation']['positions']:,}",
            f"{one['emulation']['top1_agreement']:.2%}",
            f"{one['emulation']['relative_error']:.1e}",
            f"{one['gap']:.2f}, {one['gap_where_differ'] or 0:.3f}",
            f"{one['reference']['top1_agreement']:.2%}",
            f"{one['reference']['relative_error']:.1e}",
            f"{one['blocking']['top1_agreement']:.2%}",
            f"{one['blocking']['relative_error']:.1e}",
        ]
        for name, one in kinds.items()
    ]
    header = [
        "type",
        "positions",
        "best token, llama.cpp = emulation",
        "logits differ by",
        "median distance of the best two: all, where they differ",
        "best token, llama.cpp = integer reference",
        "logits differ by",
        "best token, emulation = integer reference",
        "logits differ by",
    ]
    return table(header, rows)


def speed_rows(directory: Path) -> list[list[str]]:
    found = json.loads(kept(directory, "speed").read_text())
    ternary, half = (
        [one for one in found["rates"] if one["file"].endswith(".f16.gguf") == is_half]
        for is_half in (False, True)
    )
    return [
        [
            shape_of(directory),
            f"{found['bytes'][0] / 1e6:.1f}",
            f"{found['bytes'][1] / 1e6:.1f}",
            str(own["threads"]),
            *(f"{own[what]:.0f} / {other[what]:.0f} = {own[what] / other[what]:.2f}" for what in RATES),
            f"{max(own['spread'], other['spread']):.0%}",
        ]
        for own, other in zip(ternary, half, strict=True)
    ]


def report(directories: list[Path]) -> None:
    first = directories[0]
    found = json.loads(kept(first, "exact").read_text())
    kinds = found["kinds"]
    sizes = table(
        ["type", "bytes per ternary weight", "file, MB"],
        [[name, f"{one['bytes_per_weight']:.4f}", f"{one['bytes'] / 1e6:.1f}"] for name, one in kinds.items()]
        + [["F16", "2", f"{found['half_bytes'] / 1e6:.1f}"]],
    )
    speeds = table(
        [
            "student",
            "TQ2_0, MB",
            "F16, MB",
            "threads",
            "prompt, tokens/s, TQ2_0 / F16",
            "generated, tokens/s, TQ2_0 / F16",
            "spread of rounds",
        ],
        [row for one in directories for row in speed_rows(one)],
    )
    tokens = "\n".join(
        f"- {name}: reference {one['tokens'][0]}, emulation {one['tokens'][1]}, llama.cpp "
        f"{one['tokens'][2]}; {one['distinct']} different tokens in all"
        for name, one in kinds.items()
    )
    summary = json.loads((first / "summary.json").read_text())
    perplexity = summary["last_eval"]["eval_perplexity"]
    body = f"""\
llama-cpp-python {found["version"]}. The student has {shape_of(first)} and learned from the demo's cache until
its held-out perplexity was {perplexity:.0f}. The text is the demo's, {SAMPLES} samples of {LENGTH} tokens,
most of which it was trained on. Logits are compared with embeddings, head, keys and values in float32.

{agreement_table(kinds)}

Best next tokens at the last 12 positions:

{tokens}

A sentence is split into the same tokens as by transformers: {"yes" if found["same_split"] else "no"}.

Files, embeddings and head (one and the same tensor) in float16:

{sizes}

Speed on this CPU, rounds of both files in turn, a prompt of 256 tokens and 48 more one by one, medians of 3
rounds. The wider student is random. Embeddings and head are float16 in both.

{speeds}

llama.cpp: {found["system"]}"""
    write_result("llama_cpp", "GGUF exports in llama.cpp", body)


def deep_report(directories: list[Path]) -> None:
    """Of students of the teacher's shape; speed of the first."""
    agreement, clear, learned, trained = [], [], [], []
    for directory in directories:
        found = json.loads(kept(directory, "deep").read_text())
        summary = json.loads((directory / "summary.json").read_text())
        name = directory.name
        flags = summary["command"][summary["command"].index("--output-dir") + 2 :]
        trained.append(f"- {name}: `{' '.join(flags).replace(f'{ROOT}/', '')}`")
        learned.append([name, *(f"{one:,.1f}" for one in found["perplexity"].values())])
        for pair, one in found["pairs"].items():
            where = [one["gap_where_differ"] or 0, one["largest_gap_where_differ"] or 0]
            agreement.append(
                [
                    name,
                    pair,
                    f"{one['top1_agreement']:.2%}",
                    f"{one['relative_error']:.1e}",
                    f"{one['gap']:.2f}",
                    *(f"{distance:.3f}" for distance in where),
                ]
            )
            shares = [f"{share:.2%} of {count:,}" for _, count, share in one["by_gap"]]
            clear.append([name, pair, *shares])
    first = directories[0]
    found = json.loads(kept(first, "deep").read_text())
    rates = json.loads(kept(first, "beside").read_text())
    of_teacher = {one["threads"]: one for one in rates["rates"] if one["path"] == "teacher"}
    speeds = [
        [
            one["path"],
            f"{rates['bytes'][one['path']] / 1e6:.1f}",
            str(one["threads"]),
            *(
                f"{one[what]:.0f} / {other[what]:.0f} = {one[what] / other[what]:.2f}"
                for rate in RATES
                for what in (f"{rate}_processor", rate)
            ),
            f"{max(one['spread'], other['spread']):.0%}",
        ]
        for one in rates["rates"]
        if one["path"] != "teacher"
        for other in [of_teacher[one["threads"]]]
    ]
    newline = "\n"
    body = f"""\
llama-cpp-python {found["version"]}, files of type {" and ".join(found["types"])}. Students of {
        shape_of(first)
    }, the demo
teacher's own shape. The text is {found["positions"]:,} positions, samples of {
        DEEP_LENGTH
    } tokens, that no student
has learned from. Embeddings, head, keys and values are float32. "Plain" llama.cpp is the same source compiled
without vector instructions, whose roundings the emulation follows; the other one sums in another order.
"Nudged" is the same computation with input embeddings that differ by one part in 2^23, up or down by chance:
as little as two programs differ that sum in another order.

{newline.join(trained)}

Perplexity on this text:

{table(["student", *found["perplexity"]], learned)}

{
        table(
            [
                "student",
                "best token of",
                "the same",
                "logits differ by",
                "median distance of the best two",
                "where they differ",
                "largest where they differ",
            ],
            agreement,
        )
    }

The same where the best two are at least so far apart:

{table(["student", "best token of", *(f"{least:g}" for least in GAPS)], clear)}

The teacher's file, with float16 matrices, has {rates["bytes"]["teacher"] / 1e6:.1f} MB;
embeddings and head are float16 in all. Tokens/s, student / teacher, rounds of all in turn, a prompt of 256
tokens and 48 more one by one, medians of 3 rounds; other programs ran on the same cores, which counts less in
tokens per second of the processor, all threads together:

{
        table(
            [
                "type",
                "MB",
                "threads",
                "prompt, of the processor",
                "prompt",
                "generated, of the processor",
                "generated",
                "spread of rounds",
            ],
            speeds,
        )
    }

This llama.cpp has no vector instructions for Q2_0 on x86: its library's only `ggml_vec_dot_q2_0_q8_0` is the
plain one, while TQ2_0 and Q4_0 have a `_generic` one beside that of the processor.

llama.cpp: {found["system"]}

Plain llama.cpp: {found["plain"]}"""
    names = " ".join(one.name for one in directories)
    command = f"python benchmarks/llama_cpp.py deep-report {names}"
    write_result("llama_cpp_full_depth", "GGUF exports of the teacher's shape in llama.cpp", body, command)


def main() -> None:
    stage, *names = sys.argv[1:]
    directories = [WORK / "wide" if name == "wide" else Path(name) for name in names]
    WORK.mkdir(parents=True, exist_ok=True)
    if stage == "report":
        report(directories)
    elif stage == "deep-report":
        deep_report(directories)
    elif stage == "wide":
        wide(directories[0])
    else:
        stages = {"exact": exact, "speed": speed, "deep": deep, "beside": beside_teacher}
        for one in directories:
            kept(one, stage).write_text(json.dumps(stages[stage](one)))


if __name__ == "__main__":
    main()
