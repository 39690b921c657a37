"""Objective files: what is read out of them, and one exact line for whatever is wrong in one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from featurestore.format.schema import LogitsFeatures, LogitsSpec
from featurestore.reader import CacheReader
from student.config.flags import OBJECTIVE_FLAGS
from student.data.stores import CacheStores
from student.errors import UserError
from student.losses.catalogue import catalogue
from student.objective.files import parse_objective, read_objective
from student.objective.weights import Weight
from student.training.plan import plan_objective, plan_split
from tests.student.caches import random_samples, write_cache

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def request(text: str, folder: Path) -> str:
    file = folder / "objective.yaml"
    file.write_text(text)
    return str(file)


def test_terms_weights_and_options(tmp_path: Path) -> None:
    text = """
balance: gradient_norm
terms:
  - {loss: kl, temperature: 2}
  - loss: ce
    weight: {schedule: cosine, from: 0.5, to: 0, until: 0.25}
  - {loss: hidden_mse, weight: 3, layer_map: {1: 1, 3: 2}}
  - {loss: jsd, beta: 0.9}
"""
    found = read_objective(request(text, tmp_path))
    assert found.balanced
    kl, ce, hidden, jsd = found.terms
    assert (kl.loss.name, kl.weight, kl.options) == ("kl", Weight.constant(1.0), {"temperature": 2.0})
    assert ce.weight == Weight(0.5, 0.0, "cosine", 0.25)
    assert (hidden.weight, hidden.layer_map) == (Weight.constant(3.0), ((1, 1), (3, 2)))
    assert jsd.options == {"beta": 0.9, "temperature": 1.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", ["mapping", "terms"]),
        ("terms: []", ["terms", "at least one"]),
        ("terms: kl", ["terms", "list"]),
        ("terms: [{loss: kl}", ["not valid YAML"]),
        ("terms: [!!python/object:os.system {}]", ["not valid YAML"]),
        ("terms: [{loss: kl, loss: ce}]", ["'loss' occurs twice"]),
        ("term: [{loss: kl}]", ["unknown key 'term'", "did you mean terms?"]),
        ("terms: [kl]", ["terms[0]", "key `loss`"]),
        ("terms: [{weight: 1}]", ["terms[0]", "key `loss`"]),
        ("terms: [{loss: reverse_lk}]", ["terms[0]", "'reverse_lk'", "did you mean reverse_kl?"]),
        ("terms: [{loss: 7}]", ["unknown loss 7", "distily-train objectives"]),
        ("terms: [{loss: kl}, {loss: ce, wieght: 1}]", ["terms[1] (ce)", "'wieght'", "did you mean weight?"]),
        ("terms: [{loss: kl, beta: 1}]", ["unknown key 'beta'", "temperature"]),
        ("terms: [{loss: kl, weight: -1}]", ["weight", "at least 0", "-1"]),
        ("terms: [{loss: kl, weight: true}]", ["weight", "True"]),
        ("terms: [{loss: kl, weight: 1e-3}]", ["weight", "1.0e-3"]),
        ("terms: [{loss: kl, weight: .inf}]", ["weight", "finite"]),
        ("terms: [{loss: kl, weight: 0}]", ["nothing to learn"]),
        ("terms: [{loss: kl, temperature: 0}]", ["temperature", "from 0.05 to 100"]),
        ("terms: [{loss: jsd, beta: 1}]", ["beta", "between 0 and 1"]),
        ("terms: [{loss: sinkhorn, top: 2.5}]", ["top", "whole number"]),
        ("terms: [{loss: kl, weight: {from: 1}}]", ["schedule must be one of"]),
        ("terms: [{loss: kl, weight: {schedule: linear, from: 1}}]", ["linear schedule needs `to`"]),
        ("terms: [{loss: kl, weight: {schedule: linear, to: 1}}]", ["needs `from`"]),
        ("terms: [{loss: kl, weight: {schedule: linear, from: 0, to: 0}}]", ["zero throughout"]),
        ("terms: [{loss: kl, weight: {schedule: linear, from: 1, to: 0, until: 2}}]", ["until", "fraction"]),
        ("terms: [{loss: kl, weight: {schedule: constant, from: 1, to: 0}}]", ["constant", "no `to`"]),
        ("terms: [{loss: kl, weight: {schedule: step, from: 1, to: 0}}]", ["schedule", "'step'"]),
        ("terms: [{loss: kl, layers: [1]}]", ["layers", "leave it out"]),
        ("terms: [{loss: qkv_relation, projector: linear}]", ["projector", "leave it out"]),
        ("terms: [{loss: hidden_mse, layers: 1}]", ["layers", "[10, 20]"]),
        ("terms: [{loss: hidden_mse, layers: [1, 1]}]", ["twice"]),
        ("terms: [{loss: hidden_mse, layer_map: [1]}]", ["layer_map", "{10: 4, 20: 8}"]),
        ("terms: [{loss: hidden_mse, layers: [1], layer_map: {1: 1}}]", ["keep one"]),
        ("balance: equal\nterms: [{loss: kl}, {loss: ce}]", ["balance", "gradient_norm", "'equal'"]),
        ("balance: gradient_norm\nterms: [{loss: kl}]", ["gradient_norm", "two terms"]),
    ],
)
def test_one_line_for_what_is_wrong(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_objective(request(text, tmp_path))
    line = str(error.value)
    assert line.startswith(f"--objective {tmp_path}") and all(word in line for word in words), line


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["loss", "weight", "terms", "balance", "layers", "layer_map", "temperature", "from"])
NAMES = st.sampled_from(sorted(catalogue()))
VALUES = st.recursive(
    SCALARS | NAMES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner)
)


@given(st.fixed_dictionaries({"terms": st.lists(st.dictionaries(KEYS, VALUES))}) | VALUES)
def test_whatever_it_holds_a_file_is_read_or_refused(value: object) -> None:
    try:
        parse_objective(value, "--objective file")
    except UserError as error:
        assert str(error).startswith("--objective file")


@pytest.mark.parametrize("flag", OBJECTIVE_FLAGS)
def test_flags_of_single_terms_do_not_stand_beside_a_file(
    flag: str, distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    file = request("terms: [{loss: kl}]", tmp_path)
    value = {"logits_loss": "kl", "hidden_loss": "mse", "mapper": "all", "projector": "linear"}.get(flag, "1")
    for given_flag in (f"--{flag}", f"--{flag.replace('_', '-')}"):
        flags = ("--objective", file, given_flag, value)
        code, _, err = distily_train(cache, "--output-dir", tmp_path / "out", *flags)
        assert code == 2 and "--objective" in err and flag.replace("_", "-") in err and "exclude" in err, err


def test_what_the_cache_lacks_is_named_with_the_flag_that_adds_it(
    distily_train: Run, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    bare = write_cache(tmp_path / "bare", teacher, random_samples(8, 199), [LogitsSpec(4)])
    for loss, flag in [
        ("{loss: kl, temperature: 3}", "--temperatures 3"),
        ("{loss: hidden_mse}", "--hidden-layers"),
        ("{loss: full_kl}", "--final"),
        ("{loss: value_relation}", "--relation-layers"),
    ]:
        flags = ("--objective", request(f"terms: [{loss}]", tmp_path), "--eval-fraction", 0.3)
        code, _, err = distily_train(bare, "--output-dir", tmp_path / "out", *flags)
        assert code == 2 and "distily-cache generate" in err and flag in err, err
        assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_term_that_balance_cannot_measure_is_refused(
    distily_train: Run, cache: Path, tmp_path: Path
) -> None:
    text = "balance: gradient_norm\nterms: [{loss: kl}, {loss: hidden_mse, layer_map: {1: 0}}]"
    code, _, err = distily_train(
        cache, "--output-dir", tmp_path / "out", "--objective", request(text, tmp_path)
    )
    assert code == 2 and "balance: gradient_norm" in err and "hidden_mse_L1_to_L0" in err
    reentrant = (
        "--gradient_checkpointing",
        "True",
        "--gradient_checkpointing_kwargs",
        '{"use_reentrant": true}',
    )
    text = "balance: gradient_norm\nterms: [{loss: kl}, {loss: ce}]"
    code, _, err = distily_train(
        cache, "--output-dir", tmp_path / "out", "--objective", request(text, tmp_path), *reentrant
    )
    assert code == 2 and "use_reentrant" in err


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples" / "objectives").glob("*.yaml")), ids=lambda f: f.name
)
def test_the_examples_are_read(file: Path) -> None:
    assert read_objective(str(file)).terms


def test_confidence_is_the_mean_probability_of_what_is_trained_on(cache: Path) -> None:
    """Of learned tokens of the training samples: neither prompts nor held-out samples count."""
    reader = CacheReader.open(cache)
    wanted = parse_objective({"terms": [{"loss": "cakld"}]}, "file")
    split = plan_split(reader, 0.25, None)
    training, held_out = split.training, split.held_out
    (one,) = plan_objective(wanted, CacheStores(readers=(reader,)), None, training).terms
    found = {}
    for name, indices in (("training", training), ("all", [*training, *held_out])):
        logprobs, learned = [], []
        for index in indices:
            sample = reader.read(index)
            features = sample.features[reader.find("logits")]
            assert isinstance(features, LogitsFeatures)
            logprobs += features.label_logprob[:-1].tolist()
            learned += sample.loss_mask[1:].tolist()
        found[name] = [math.exp(p) for p, is_learned in zip(logprobs, learned, strict=True) if is_learned]
        found[f"{name} with prompts"] = [math.exp(p) for p in logprobs]
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert one.options["confidence"] == pytest.approx(means.pop("training"), rel=1e-6)
    assert all(one.options["confidence"] != pytest.approx(mean, rel=1e-3) for mean in means.values()), means
    given_one = parse_objective(yaml.safe_load("terms: [{loss: cakld, confidence: 0.25}]"), "file")
    assert plan_objective(given_one, CacheStores(readers=(reader,)), None, training).terms[0].options == {
        "confidence": 0.25
    }


def test_confidence_does_not_depend_on_the_order_of_a_large_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all samples are looked at, those of the smallest ids are, wherever they stand."""
    monkeypatch.setattr("student.training.plan.CONFIDENCE_SAMPLES", 5)
    reader = CacheReader.open(cache)
    wanted = parse_objective({"terms": [{"loss": "cakld"}]}, "file")
    smallest = sorted(range(len(reader)), key=lambda index: reader.sample_ids[index])[:5]
    every, few = (
        plan_objective(wanted, CacheStores(readers=(reader,)), None, indices).terms[0].options
        for indices in (range(len(reader)), smallest)
    )
    assert every == few
