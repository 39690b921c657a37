"""What `--select` gives where a part of the text cannot be learned: unreadable words or documents.

Words are made unreadable as errors of scanning or encoding leave them: random letters, as many as they had.
In one cache this happens to each word with probability 0.2, in the other to all words of a document, with
probability 0.5. No run is told to which. Students of the teacher's weights, narrowed to 2 layers of 128, take
80 steps of 2 samples of 128 tokens, and are measured on clean documents that none has seen. All rows of a
seed and cache have the start, the samples and their order in common and take the same steps, so those with
`--select` learn from fewer positions. Thresholds were chosen by what the teacher says of the text, before any
student was trained.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RUN, generate, table, write_result
from transformers import AutoTokenizer

from distily import DistillationConfig, DistillationTrainer
from featurestore.format.schema import LogitsFeatures
from featurestore.reader import CacheReader

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is made unreadable with probability `share`, and the condition that shall leave it out; keeps: the
    same condition on surprise and entropy of all positions.
    """

    share: float
    select: str
    keeps: Callable[[Array, Array], Array]


SEEDS = (0, 1, 2)
LABELS: dict[str, Any] = {"logits_loss": "none", "ce_weight": 1.0}
NOISES = {
    "words": Noise(
        share=0.2,
        select="surprise<65%",
        keeps=lambda surprise_N, _: surprise_N <= np.quantile(surprise_N, 0.65),
    ),
    "documents": Noise(share=0.5, select="entropy<4.5", keeps=lambda _, entropy_N: entropy_N < 4.5),
}
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CLEAN_DOCUMENTS, SAMPLES = 12, 180
TRAINING: dict[str, Any] = {
    "max_steps": 80,
    "per_device_train_batch_size": 2,
    "learning_rate": 4e-3,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
WORK = RUN / "noisy"
WORD = re.compile(r"[A-Za-z]+")

Metrics = dict[str, float]


def capture() -> None:
    """Caches of documents with either noise and of clean ones, which are the last."""
    WORK.mkdir(exist_ok=True)
    texts = [json.loads(line)["text"] for line in (RUN / "topics.jsonl").read_text("utf-8").splitlines()]
    clean, given = texts[-CLEAN_DOCUMENTS:], texts[:-CLEAN_DOCUMENTS]
    for name, noise in NOISES.items():
        _generate(name, _spoilt(given, name == "documents", noise.share), "--num-samples", str(SAMPLES))
    _generate("clean", clean)


def _spoilt(texts: list[str], whole: bool, share: float) -> list[str]:
    """Texts with unreadable words, of whole texts or single ones."""
    draw = random.Random(0)

    def letters(word: re.Match[str]) -> str:
        return "".join(draw.choices(ascii_lowercase, k=len(word.group())))

    def some(word: re.Match[str]) -> str:
        return letters(word) if draw.random() < share else word.group()

    if whole:
        return [WORD.sub(letters, text) if draw.random() < share else text for text in texts]
    return [WORD.sub(some, text) for text in texts]


def _generate(name: str, texts: list[str], *flags: str) -> None:
    data = WORK / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    generate(WORK / name, *flags, "--dtype", "float32", "--pack", "--max-seq-len", "128", data=data)


def learn(noise: str, flags: dict[str, Any], seed: int) -> Metrics:
    """KL and perplexity on the clean documents of a run on the noisy ones."""
    with tempfile.TemporaryDirectory() as out:
        args = DistillationConfig(output_dir=out, student_model_config=SHAPE, seed=seed, **(TRAINING | flags))
        trainer = DistillationTrainer(
            args=args, train_dataset=str(WORK / noise), eval_dataset=str(WORK / "clean")
        )
        trainer.train()
        found = trainer.evaluate()
    return {name: float(found[f"eval_{name}"]) for name in ("kl", "perplexity")}


def result(noise: str, select: str | None, seed: int) -> Metrics:
    """Of one run, kept, so that the study resumes."""
    flags = LABELS if select is None else LABELS | {"select": select}
    file = WORK / f"{noise}-{'all' if select is None else 'selected'}-{seed}.json"
    manifests = [CacheReader.open(WORK / name).manifest_digest for name in (noise, "clean")]
    settings = {"manifests": manifests, "flags": TRAINING | flags, "shape": SHAPE}
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "metrics": learn(noise, flags, seed)}
        file.write_text(json.dumps(found))
    print(seed, noise, select, found["metrics"], flush=True)
    metrics: Metrics = found["metrics"]
    return metrics


def main() -> None:
    capture()
    rows, said = [], []
    for name, noise in NOISES.items():
        base = [result(name, None, seed) for seed in SEEDS]
        chosen = [result(name, noise.select, seed) for seed in SEEDS]
        gained = (
            [one["kl"] - other["kl"] for one, other in zip(chosen, base, strict=True)],
            [
                100 * (one["perplexity"] / other["perplexity"] - 1)
                for one, other in zip(chosen, base, strict=True)
            ],
        )
        for words, found, cells in (
            ("all positions", base, ["–", "–"]),
            (f"`--select {noise.select}`", chosen, [_difference(values) for values in gained]),
        ):
            means = [_spread([one[column] for one in found]) for column in ("kl", "perplexity")]
            rows.append([name, words, *means, *cells])
        share, kept_bad, kept_other = separation(name, noise)
        said.append(
            f"- {name}: {share:.0%} of the tokens are unreadable; `--select {noise.select}` keeps "
            f"{kept_bad:.0%} of them and {kept_other:.0%} of the others."
        )
    header = [
        *("unreadable", "labels of", "KL", "perplexity"),
        *("KL against all positions", "perplexity against all positions, %"),
    ]
    intro = (__doc__ or "").split("\n", 2)[2].strip()
    body = (
        f"{intro}\n\n"
        + "\n".join(said)
        + "\n\nThree seeds; means ± standard deviations, in the last columns "
        f"of pairs with the same seed (below zero is better).\n\n{table(header, rows)}"
    )
    write_result("noisy_text", "Positions selected where a part of the text is noise", body)


def separation(name: str, noise: Noise) -> tuple[float, float, float]:
    """Shares of the positions: those whose next token is of an unreadable word, those of these that --select
    keeps, and those of the others.
    """
    reader, tokenizer = CacheReader.open(WORK / name), AutoTokenizer.from_pretrained(RUN / "teacher")
    words = set(WORD.findall((RUN / "topics.jsonl").read_text("utf-8")))
    spec = reader.find_logits()
    surprises, entropies, unreadable = [], [], []
    for index in range(len(reader)):
        sample = reader.read(index, [spec])
        features = sample.features[spec]
        assert isinstance(features, LogitsFeatures)
        surprises.append(-features.label_logprob[:-1])
        entropies.append(features.entropy[:-1])
        pieces = [tokenizer.decode([token]) for token in sample.tokens.tolist()]
        starts, text = np.cumsum([0, *map(len, pieces)]), "".join(pieces)
        bad = np.zeros(len(text), np.bool_)
        for word in WORD.finditer(text):
            bad[word.start() : word.end()] = word.group() not in words
        unreadable.append([bad[a:b].any() for a, b in pairwise(starts[1:])])
    bad_N = np.concatenate(unreadable)
    kept_N = noise.keeps(np.concatenate(surprises), np.concatenate(entropies))
    return float(bad_N.mean()), float(kept_N[bad_N].mean()), float(kept_N[~bad_N].mean())


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def _difference(values: list[float]) -> str:
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
