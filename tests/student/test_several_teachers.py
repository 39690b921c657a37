"""`distily-train from-cache STORE1 STORE2 …`: matched samples, their mixture, a teacher for each term."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distily import DistillationConfig, DistillationTrainer, Experiment
from featurestore.format.schema import (
    NO_DRAW,
    GroupFeatures,
    GroupSpec,
    HiddenSpec,
    LogitsFeatures,
    LogitsSpec,
    LseSpec,
    Sample,
)
from featurestore.reader import CacheReader
from student.data.batches import CacheOrder
from student.data.matched import MatchedDataset
from student.data.stores import open_stores, order_digest
from student.errors import UserError
from tests.student.caches import features_of, random_samples, write_cache, write_given_cache

Run = Callable[..., tuple[int, str, str]]
SAMPLES = random_samples(40, 199)
QUICK = ("--per-device-train-batch-size", 4, "--report-to", "none", "--json", "--max-steps", 3)
SMALL = ("--student-model-config", '{"num_hidden_layers": 1}', "--init", "random")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A teacher of the same shape with other weights."""
    path = tmp_path_factory.mktemp("other") / "teacher"
    shutil.copytree(teacher, path)
    generator = torch.Generator().manual_seed(9)
    weights = load_file(path / "model.safetensors")
    moved = {n: w + 0.2 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file(moved, path / "model.safetensors", {"format": "pt"})
    return path


def drawing(model: Any, sample: Sample, spec: LogitsSpec) -> LogitsFeatures:
    """The teacher's heads, and tokens drawn from outside them."""
    whole = LogitsSpec(199)
    full = features_of(model, sample, [whole])[whole]
    assert isinstance(full, LogitsFeatures)
    count, k = len(sample), spec.top_k
    ids, logits = full.ids.reshape(count, 199), full.logits.reshape(count, 199)
    rng = np.random.default_rng([int(sample.id[:8], 16), spec.seed])
    draws = []
    for row, z in zip(ids[:, k:], logits[:, k:], strict=True):
        p = np.exp(z.astype(np.float64) - z.max())
        draws.append(np.sort(rng.choice(row, spec.tail, p=p / p.sum())))
    return LogitsFeatures(
        counts=np.full(count, k, np.uint16),
        ids=ids[:, :k].ravel(),
        logits=logits[:, :k].ravel(),
        lse=full.lse,
        label_logprob=full.label_logprob,
        entropy=full.entropy,
        tail_ids=np.array(draws, np.int32),
    )


def write_drawn(path: Path, teacher: Path, samples: list[Sample], spec: LogitsSpec, digest: str) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    hidden = HiddenSpec(1, "f32")

    def features(sample: Sample) -> dict[GroupSpec, GroupFeatures]:
        return {spec: drawing(model, sample, spec), **features_of(model, sample, [hidden])}

    return write_given_cache(path, teacher, samples, features, digest)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, teacher: Path, other: Path) -> tuple[Path, Path]:
    """Of 36 samples each, 32 in both, in another order."""
    folder = tmp_path_factory.mktemp("stores")
    return (
        write_drawn(folder / "a", teacher, SAMPLES[:36], LogitsSpec(6, tail=5), "aa" * 16),
        write_drawn(folder / "b", other, SAMPLES[:3:-1], LogitsSpec(9, tail=4, seed=7), "bb" * 16),
    )


@pytest.fixture
def learn(distily_train: Run) -> Callable[..., dict[str, Any]]:
    """Runs a successful training; its summary, and the log as `log`."""

    def run(paths: tuple[Path, ...], out: Path, *arguments: object) -> dict[str, Any]:
        code, printed, err = distily_train(*paths, "--output-dir", out, *QUICK, *SMALL, *arguments)
        assert code == 0, err
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found: dict[str, Any] = json.loads(printed)
        return found | {"log": log, "said": err}

    return run


@pytest.fixture
def refuse(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    return lambda *arguments: refused("from-cache", *arguments, "--output-dir", tmp_path / "refused", *SMALL)


def objective(*terms: dict[str, Any]) -> tuple[str, str]:
    return "--objective", json.dumps({"terms": terms})


def losses_of(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["log"] if "loss" in entry]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "model.safetensors"))


def test_samples_that_all_hold_are_trained_on_or_held_out(
    stores: tuple[Path, Path], learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = learn(stores, tmp_path / "out", "--teacher-weights", "3,1", "--eval-fraction", 0.25)
    assert "2 caches hold samples: a 36, b 36; 32 are in all of them and are used" in found["said"]
    assert "held-out metrics compare with the mixture 0.75 a + 0.25 b" in found["said"]
    assert found["train_samples"] + found["held_out_samples"] == found["matched_samples"] == 32
    assert [one["weight"] for one in found["stores"]] == [0.75, 0.25]
    assert [one["teacher"]["digest"] for one in found["stores"]] == ["aa" * 16, "bb" * 16]
    assert found["held_out_kl"] == "unbiased" and found["last_eval"]["eval_kl"] > 0
    # A sample is on the side on which it is for one teacher alone.
    alone = learn((stores[0],), tmp_path / "alone", "--eval-fraction", 0.25)
    assert alone["held_out_samples"] >= found["held_out_samples"] and "stores" not in alone
    record = json.loads((tmp_path / "out" / "cache_manifest.json").read_text())
    assert record["teacher_weights"] == [0.75, 0.25] and len(record["further_manifests"]) == 1
    report = (tmp_path / "out" / "report.html").read_text()
    assert "2 caches of their features" in report and "bbbbbbbbbbbb" in report


def test_matched_samples_carry_the_features_of_each_cache(stores: tuple[Path, Path]) -> None:
    opened = open_stores(list(map(str, stores)), [None, None])
    readers = [CacheReader.open(path) for path in stores]
    groups = [[reader.find("logits")] for reader in readers]
    kept = [i for i in range(36) if i not in set(opened.missing().tolist())]
    data = pickle.loads(pickle.dumps(MatchedDataset(opened, kept, groups)))
    places = {sample: index for index, sample in enumerate(readers[1].sample_ids)}
    for place, index in enumerate(kept):
        sample, (second,) = data[place], data[place].further
        assert sample.id == second.id == readers[0].sample_ids[index]
        np.testing.assert_array_equal(sample.tokens, second.tokens)
        alone = readers[1].read_codes(places[sample.id], groups[1]).features[groups[1][0]]
        np.testing.assert_array_equal(second.features[groups[1][0]].ids, alone.ids)  # type: ignore[union-attr]
        assert not data[~place].loss_mask.any() and not data[~place].further[0].loss_mask.any()


def test_the_order_is_a_function_of_all_manifests(stores: tuple[Path, Path]) -> None:
    opened = open_stores(list(map(str, stores)), [None, None])
    data = MatchedDataset(opened, range(36), [[], []])
    expected = order_digest(opened.manifests)
    assert expected == order_digest([*opened.manifests]) != order_digest(opened.manifests[::-1])
    assert expected != order_digest([opened.manifests[0], "ab" * 16])
    assert order_digest(opened.manifests[:1]) == opened.manifests[0]
    matched = [i for i in range(36) if i not in set(opened.missing().tolist())]
    data = MatchedDataset(opened, matched, [[], []])
    order = list(CacheOrder(data, 0, 4, lambda: 0))
    assert sorted(order) == list(range(32)) and order == list(data.epoch_order(0, 0))
    assert order != list(CacheOrder(data, 0, 4, lambda: 1))


def test_the_mixture_teaches_as_one_term_for_each_teacher(
    stores: tuple[Path, Path], learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """sum of w_i KL(p_i || q) by way of one mixture, and of two passes over the head: in float32, a sum over
    the positions of a batch rounds by at most their number times eps.
    """
    sgd = ("--optim", "sgd", "--learning-rate", 0.1, "--logging-steps", 1, "--eval-fraction", 0)
    sgd += ("--lr-scheduler-type", "constant", "--warmup-steps", 0)
    mixed = learn(stores, tmp_path / "mixed", "--teacher-weights", "0.75,0.25", *sgd)
    terms = [{"loss": "kl", "weight": w, "teacher": t} for w, t in ((0.75, "a"), (0.25, 1))]
    apart = learn(stores, tmp_path / "apart", *objective(*terms), *sgd)
    assert list(apart["objective"]) == ["kl_teacher0", "kl_teacher1"]
    bound = 4 * 24 * float(np.finfo(np.float32).eps)
    losses = [losses_of(run) for run in (mixed, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    start, one = weights_of(tmp_path / "mixed"), weights_of(tmp_path / "apart")
    for name, weight in one.items():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=bound * float(weight.abs().max()))


def uniform(sample: Sample, which: str) -> dict[GroupSpec, GroupFeatures]:
    """16 tokens at each position, of which each teacher knows 8, with equal steps of 1/16 nat between them,
    and nothing outside; the mixture with weights e^(1/2) to 1. Every number is stored exactly.
    """
    count, steps = len(sample), np.arange(8) / 16.0
    seed = int(hashlib.sha256(sample.id.encode()).hexdigest()[:8], 16)
    tokens = np.stack([np.random.default_rng([seed, t]).permutation(199)[:16] for t in range(count)])
    ids = {"a": tokens[:, :8], "b": tokens[:, 8:], "both": tokens}[which]
    logits = {"a": -steps, "b": -steps, "both": np.concatenate([-steps, -steps - 0.5])}[which]
    order = np.argsort(-logits, kind="stable")
    ids, logits = ids[:, order], logits[order].astype(np.float32)
    # A hair less than it is, so that the head holds everything.
    lse = math.log(np.exp(logits.astype(np.float64)).sum()) - 1e-5
    label = np.full(count, -2.0, np.float32)
    label[-1] = np.nan
    width = len(logits)
    return {
        LogitsSpec(16, tail=2): LogitsFeatures(
            counts=np.full(count, width, np.uint16),
            ids=ids.ravel().astype(np.uint32),
            logits=np.tile(logits, count),
            lse=np.full(count, lse, np.float32),
            label_logprob=label,
            entropy=np.full(count, 2.0, np.float32),
            tail_ids=np.full((count, 2), NO_DRAW, np.int32),
        )
    }


def test_two_stores_teach_as_the_store_of_their_mixture(
    teacher: Path, learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """All samples in each step, so that the order does not matter. What the two runs add up in another order
    are float32 sums over positions and columns. The KL to the mixture is smaller by the teachers'
    Jensen-Shannon divergence, which of disjoint teachers is the entropy of their weights.
    """
    samples = SAMPLES[:12]
    paths = {
        which: write_given_cache(tmp_path / which, teacher, samples, lambda s, w=which: uniform(s, w))
        for which in ("a", "b", "both")
    }
    flags = ("--per-device-train-batch-size", 12, "--eval-fraction", 0, "--logging-steps", 1)
    flags += (
        "--optim",
        "sgd",
        "--learning-rate",
        0.5,
        "--lr-scheduler-type",
        "constant",
        "--warmup-steps",
        0,
    )
    flags += ("--max-steps", 6)
    share = 1 / (1 + math.exp(-0.5))
    two = learn(
        (paths["a"], paths["b"]), tmp_path / "two", "--teacher-weights", f"{share!r},{1 - share!r}", *flags
    )
    one = learn((paths["both"],), tmp_path / "one", *flags)
    divergence = -share * math.log(share) - (1 - share) * math.log(1 - share)
    losses = [np.array(losses_of(run)) for run in (two, one)]
    eps = float(np.finfo(np.float32).eps)
    bound = sum(map(len, samples)) * eps
    np.testing.assert_allclose(losses[0] - divergence, losses[1], rtol=0, atol=bound * losses[0].max())
    assert losses[1][-1] < losses[1][0] - 0.01, "nothing was learned"
    start, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, weight in start.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=6 * bound * float(weight.abs().max()))


def test_terms_choose_their_teacher(
    stores: tuple[Path, Path], learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Hidden states are the first teacher's where none is named; a loss on labels goes with the others."""
    terms = [{"loss": name, **more} for name, more in (
        ("kl", {}), ("ce", {}), ("tsld", {}), ("soft_mse", {}), ("one_for_all", {}),
        ("reverse_kl", {"teacher": "b"}), ("kl", {"teacher": 0}), ("cakld", {"teacher": 1}),
        ("hidden_mse", {}), ("hidden_mse", {"teacher": "b"}),
    )]  # fmt: skip
    flags = (*objective(*terms), "--logging-steps", 1, "--eval-fraction", 0.25)
    found = learn(stores, tmp_path / "out", *flags)
    labels = ["kl", "ce", "tsld", "soft_mse", "one_for_all"]
    labels += ["reverse_kl_teacher1", "kl_teacher0", "cakld_teacher1"]
    labels += ["hidden_mse_L1_to_L0", "hidden_mse_L1_to_L0_teacher1"]
    assert list(found["objective"]) == labels
    entry = next(entry for entry in found["log"] if "loss" in entry)
    values = [entry[f"loss_{label}"] for label in labels]
    assert all(math.isfinite(value) for value in values)
    assert sum(values) == pytest.approx(entry["loss"], rel=1e-4)
    assert values[-2] != pytest.approx(values[-1], rel=1e-4), "of one teacher twice"
    packed = learn(stores, tmp_path / "packed", *flags, "--pack-rows")
    first = next(entry for entry in packed["log"] if "loss" in entry)
    # Packed rows round in another order.
    assert {n: first[n] for n in first if n.startswith("loss_")} == pytest.approx(
        {n: entry[n] for n in entry if n.startswith("loss_")}, rel=1e-4
    )


def test_the_full_distribution_of_a_second_cache(
    stores: tuple[Path, Path], full_store: Path, learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Its head and states are those of the cache that the term names: as with that cache alone."""
    both = [{"loss": name, "teacher": 1} for name in ("full_jsd", "fisher_mse")]
    alone = [{"loss": name} for name in ("full_jsd", "fisher_mse")]
    flags = (
        "--per-device-train-batch-size",
        12,
        "--eval-fraction",
        0,
        "--max-steps",
        1,
        "--logging-steps",
        1,
    )
    first = {"loss": "kl", "teacher": 0}
    two = learn((stores[0], full_store), tmp_path / "two", *flags, *objective(first, *both))
    one = learn((full_store,), tmp_path / "one", *flags, *objective(*alone))
    assert two["matched_samples"] == one["train_samples"] == 12
    entries = [next(entry for entry in run["log"] if "loss" in entry) for run in (two, one)]
    for label in ("full_jsd", "fisher_mse_L3_to_L1"):
        assert entries[0][f"loss_{label}_teacher1"] == pytest.approx(entries[1][f"loss_{label}"], rel=1e-5)


def test_a_resumed_run_is_the_same_and_takes_no_other_stores_or_weights(
    stores: tuple[Path, Path],
    learn: Callable[..., dict[str, Any]],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    flags = ("--eval-fraction", 0, "--max-steps", 4, "--save-steps", 2, "--logging-steps", 1)
    weights = ("--teacher-weights", "0.7,0.3")
    whole = learn(stores, tmp_path / "out", *weights, *flags)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resume = ("--resume-from-checkpoint", checkpoint)
    again = learn(stores, tmp_path / "again", *weights, *flags, *resume)
    assert [e["loss"] for e in again["log"] if "loss" in e] == [
        e["loss"] for e in whole["log"] if "loss" in e
    ]
    for name, weight in weights_of(tmp_path / "out").items():
        assert torch.equal(weights_of(tmp_path / "again")[name], weight)

    def line(paths: tuple[Path, ...], *more: object) -> str:
        words = ("--output-dir", tmp_path / "no", *QUICK[:-3], *SMALL, *flags, *resume)
        return refused("from-cache", *paths, *words, *more)

    assert "0.7,0.3" in line(stores) and "--teacher-weights" in line(stores)
    assert "2 STOREs" in line(stores[:1])
    assert "manifest" in line(stores[::-1], *weights)
    assert "--manifest" in line(stores, *weights, "--manifest", "ab,cd")


def test_refusals(
    stores: tuple[Path, Path],
    teacher: Path,
    other: Path,
    refuse: Callable[..., str],
    tmp_path: Path,
) -> None:
    a, b = stores
    assert "2 weights for 3" in refuse(a, b, a, "--teacher-weights", "1,1")
    assert "given twice" in refuse(a, a)
    assert "no effect" in refuse(a, "--teacher-weights", "1")
    for wrong in ("0,1", "1,x", "1,inf", "nan,1", ""):
        assert "above 0" in refuse(a, b, "--teacher-weights", wrong)
    assert "linear" in refuse(a, b, "--logits-loss", "jsd") and "teacher: 0" in refuse(
        a, b, "--logits-loss", "jsd"
    )
    assert "linear" in refuse(a, b, "--logits-loss", "full_kl")
    assert "temperature 2" in refuse(a, b, *objective({"loss": "kl", "temperature": 2.0}))
    assert "0 or a, 1 or b" in refuse(a, b, *objective({"loss": "kl", "teacher": 2}))
    assert "0 or a" in refuse(a, *objective({"loss": "kl", "teacher": "b"}))
    assert "number of a STORE" in refuse(a, b, *objective({"loss": "kl", "teacher": True}))
    assert "labels alone" in refuse(a, b, *objective({"loss": "ce", "teacher": 0}))
    assert "leave --top-k" in refuse(a, b, "--top-k", 4)
    assert "each of the 2 STOREs" in refuse(a, b, "--manifest", "ab")
    heads = write_cache(tmp_path / "heads", other, SAMPLES[:8], [LogitsSpec(6)])
    line = refuse(a, heads)
    assert "heads gives none" in line and "--tail 16" in line and "one term for each teacher" in line
    cut = [Sample(tokens=s.tokens[:4], loss_mask=s.loss_mask[:4]) for s in SAMPLES[:8]]
    short = write_cache(tmp_path / "short", other, cut, [LogitsSpec(6)])
    assert "no sample is in all of" in refuse(a, short) and "--max-seq-len" in refuse(a, short)


def test_why_no_sample_matches(teacher: Path, refuse: Callable[..., str], tmp_path: Path) -> None:
    def store(name: str, samples: list[Sample], first: int, length: int) -> Path:
        cut = [
            Sample(tokens=s.tokens[:length], loss_mask=s.loss_mask[:length], documents=(f"{first + i:016x}",))
            for i, s in enumerate(samples)
        ]
        return write_given_cache(tmp_path / name, teacher, cut, lambda sample: uniform(sample, "a"))

    whole, short = store("whole", SAMPLES[:6], 0, 99), store("short", SAMPLES[:6], 0, 3)
    other = store("other", SAMPLES[6:12], 100, 99)
    line = refuse(whole, short)
    assert "their documents are the same" in line and "and 3 tokens" in line
    assert "share no document" in refuse(whole, other)


def test_a_tokenizer_or_a_vocabulary_of_its_own_is_refused(
    stores: tuple[Path, Path], teacher: Path, refuse: Callable[..., str], tmp_path: Path
) -> None:
    wide = Path(shutil.copytree(teacher, tmp_path / "wide"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))

    def features(sample: Sample) -> dict[GroupSpec, GroupFeatures]:
        return uniform(sample, "a")

    path = write_given_cache(tmp_path / "store", wide, SAMPLES[:4], features)
    line = refuse(stores[0], path)
    assert "200 tokens" in line and "199" in line and "one vocabulary" in line
    path = write_given_cache(tmp_path / "words", teacher, SAMPLES[:4], features, tokenizer="ef" * 16)
    assert "efefefefefef" in refuse(stores[0], path) and "one tokenizer" in refuse(stores[0], path)


def test_caches_that_cannot_be_mixed_teach_apart_and_it_is_said_what_is_measured(
    stores: tuple[Path, Path],
    other: Path,
    learn: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Heads without draws, at another temperature too: a term for each teacher."""
    heads = write_cache(tmp_path / "heads", other, SAMPLES[:20], [LogitsSpec(6), LseSpec(2.0)])
    terms = [
        {"loss": "kl", "teacher": 0},
        {"loss": "kl", "teacher": 1},
        {"loss": "jsd", "teacher": 1, "temperature": 2.0},
    ]
    found = learn((stores[0], heads), tmp_path / "out", *objective(*terms), "--eval-fraction", 0.25)
    assert "compare with a alone" in found["said"] and "which heads lacks" in found["said"]
    assert found["held_out_kl"] == "unbiased" and found["held_out_against"].startswith(
        "held-out metrics compare"
    )


def test_states_of_one_cache_and_distributions_of_another(
    stores: tuple[Path, Path], other: Path, learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    states = write_cache(tmp_path / "states", other, SAMPLES[:20], [HiddenSpec(1, "f32")])
    terms = [{"loss": "hidden_mse"}, {"loss": "kl", "teacher": "a"}, {"loss": "ce"}]
    found = learn((states, stores[0]), tmp_path / "out", *objective(*terms), "--eval-fraction", 0.25)
    assert list(found["objective"]) == ["kl_teacher1", "ce", "hidden_mse_L1_to_L0"]
    assert "compare with a alone" in found["held_out_against"] and found["last_eval"]["eval_kl"] > 0


def test_whole_heads_are_mixed_exactly(
    teacher: Path, other: Path, learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Caches of the whole vocabulary need no draws, and a student that is the mixture's teacher has no KL."""
    samples = SAMPLES[:10]
    paths = tuple(
        write_cache(tmp_path / name, which, samples, [LogitsSpec(199)], digest=digit * 32)
        for name, which, digit in (("a", teacher, "a"), ("b", teacher, "b"))
    )
    found = learn(
        paths, tmp_path / "out", "--eval-fraction", 0.3, "--student-model-config", "{}", "--init", "teacher"
    )
    assert found["held_out_kl"] == "exact"
    # A quarter of a step of 1/16 nat in every log-probability, squared and halved, is what storing costs.
    assert 0 <= found["first_eval"]["eval_kl"] < (1 / 16) ** 2


def test_the_python_api_takes_several_caches(
    stores: tuple[Path, Path], learn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    flags |= {"student_model_config": {"num_hidden_layers": 1}, "init": "random", "save_steps": 1}
    learn(stores, tmp_path / "command", "--teacher-weights", "0.7,0.3", "--max-steps", 2, "--save-steps", 1)

    def trainer(out: Path, *caches: Any, weights: list[float]) -> DistillationTrainer:
        args = DistillationConfig(output_dir=str(out), teacher_weights=weights, **flags)
        return DistillationTrainer(args=args, train_dataset=caches)

    api = trainer(tmp_path / "api", CacheReader.open(stores[0]), str(stores[1]), weights=[0.7, 0.3])
    api.train()
    api.save_model()
    for name, weight in weights_of(tmp_path / "command").items():
        assert torch.equal(weights_of(tmp_path / "api")[name], weight)
    with pytest.raises(UserError, match=r"0\.7,0\.3"):
        trainer(tmp_path / "api", *stores, weights=[0.5, 0.5]).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="eval_dataset"):
        DistillationTrainer(train_dataset=stores, eval_dataset=stores[0])
    experiment = Experiment(stores, tmp_path / "experiment", teacher_weights=[0.7, 0.3], **flags)
    batch = next(experiment.batches())
    assert torch.isfinite(experiment.losses(batch)["kl"]) and set(batch["further"]) == {1}


def test_recipes_sweeps_plans_and_cards_take_several_stores(
    stores: tuple[Path, Path], distily: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [{"name": "first", "logits-loss": "none", "ce-weight": 1}, {"name": "second"}]
    flags = {"student-model-config": {"num_hidden_layers": 1}, "init": "random", "eval-fraction": 0.25}
    flags |= {"teacher-weights": [0.7, 0.3], "report-to": "none", "per-device-train-batch-size": 4}
    recipe.write_text(json.dumps(flags | {"stages": stages}))
    out = tmp_path / "out"
    words = ("--recipe", recipe, "--output-dir", out, "--max-steps", 2)
    code, _, err = distily("from-cache", *stores, *words)
    assert code == 0, err
    manifests = [CacheReader.open(path).manifest_digest for path in stores]
    assert json.loads((out / "stage.json").read_text())["manifest"] == ",".join(manifests)
    code, _, err = distily("card", out)
    assert code == 0, err
    card = (out / "README.md").read_text()
    assert "from 2 caches of" in card and all(digest in card for digest in manifests)
    assert "| b | 0.3 |" in card and "32 samples are in all of the caches" in card
    code, printed, err = distily("eval", out, "--json")
    assert code == 0, err
    measured, last = json.loads(printed)["cache"], json.loads((out / "summary.json").read_text())["last_eval"]
    for name in ("kl", "kl_se", "ce", "top1_agreement"):
        assert measured["student"][name] == pytest.approx(last[f"eval_{name}"], rel=1e-4)
    assert measured["teacher"]["perplexity"] == pytest.approx(last["eval_teacher_perplexity"], rel=1e-4)
    assert measured["student"]["reverse_kl"] is None and measured["exactness"] == {"kl": "unbiased"}
    assert measured["mixture"] == "0.7 a + 0.3 b" and measured["manifest"] == ",".join(manifests)
    assert sum(row["positions"] for row in measured["by_entropy"]) == measured["positions"]
    code, shown, err = distily("eval", out, "--cache", stores[1])
    assert code == 0 and "KL(student | teacher)" in shown, err
    assert "2 STOREs" in refused("eval", out, "--manifest", "ab")
    code, printed, err = distily("plan", *stores, *SMALL, "--json", "--teacher-weights", "1,2")
    assert code == 0, err
    assert json.loads(printed)["work"]["samples"] <= 32
    spec = tmp_path / "sweep.yaml"
    grid = {"teacher-weights": ["0.5,0.5", "0.9,0.1"]}
    spec.write_text(json.dumps({"base": {**flags, "teacher-weights": None, "max-steps": 1}, "grid": grid}))
    code, printed, err = distily("sweep", *stores, spec, "--out", tmp_path / "sweep", "--jobs", 1, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert found["store"] == list(map(str, stores)) and found["manifest"] == ",".join(manifests)
    assert {run["state"] for run in found["runs"]} == {"finished"}
    assert len({run["metrics"]["eval_kl"] for run in found["runs"]}) == 2
    assert "does not have" in refused("sweep", *stores[::-1], spec, "--out", tmp_path / "sweep")
