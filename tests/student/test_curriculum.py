"""`--select` and `--weight`: which positions are learned and what each counts, against plain references."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distily import DistillationConfig, DistillationTrainer, Experiment
from featurestore.format.positions import kept_positions
from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec
from featurestore.reader import CacheReader
from student.data.batches import IGNORE, CachedDataset, Collator
from student.data.curriculum import plan_curriculum
from student.data.matched import collator_of
from student.data.measures import Curriculum, parse_select
from student.data.stores import open_stores
from student.errors import UserError
from student.objective.terms import Objective, term
from student.training.model import DistillationModel
from tests.student import fed
from tests.student.caches import features_of, random_samples, write_cache, write_given_cache
from tests.student.conftest import SPECS
from tests.student.test_model import OBJECTIVE, other_student, plain_terms
from tests.student.test_ranks import LAUNCH, ROOT

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--student-model-config", '{"num_hidden_layers": 1}', "--init", "random")


def bound(text: str | None, weight: str | None, cache: Path) -> Curriculum:
    asked = Curriculum(conditions=parse_select(text) if text else (), weight=weight)
    stores = open_stores([str(cache)], [None])
    made = plan_curriculum(asked, stores, range(len(stores.first)))
    assert made is not None
    return made


def measures(reader: CacheReader, index: int) -> dict[str, np.ndarray[Any, Any]]:
    """As the reader decodes them."""
    features = reader.read(index, [reader.find("logits")]).features[reader.find("logits")]
    assert isinstance(features, LogitsFeatures)
    return {"entropy": features.entropy, "surprise": -features.label_logprob}


@pytest.mark.parametrize(
    ("select", "weight"),
    [("surprise<3", None), (None, "entropy"), ("entropy>4,surprise<5", "surprise"), ("entropy<40%", None)],
)
@pytest.mark.parametrize("groups", [SPECS, SPECS[1:]])  # the second reads no distribution for its objective
def test_a_sample_is_learned_where_all_conditions_hold(
    select: str | None, weight: str | None, groups: list[Any], cache: Path
) -> None:
    reader, curriculum = CacheReader.open(cache), bound(select, weight, cache)
    plain, taught = (
        CachedDataset(reader, range(9), groups),
        CachedDataset(reader, range(9), groups, curriculum),
    )
    everything = [measures(reader, index) for index in range(len(reader))]
    learned = [reader.read(index, []).loss_mask for index in range(len(reader))]
    entropies = [one["entropy"][:-1][mask[1:]] for one, mask in zip(everything, learned, strict=True)]
    quantile = np.quantile(np.concatenate(entropies), 0.4, method="inverted_cdf")
    for index in range(9):
        values, mask = everything[index], plain[index].loss_mask.copy()
        for t in range(len(mask) - 1):
            if select == "surprise<3":
                mask[t + 1] &= values["surprise"][t] < 3
            elif select == "entropy<40%":
                mask[t + 1] &= values["entropy"][t] <= quantile
            elif select:
                mask[t + 1] &= values["entropy"][t] > 4 and values["surprise"][t] < 5
        mask[0] = False
        sample = taught[index]
        assert sample.loss_mask.tolist() == mask.tolist()
        assert not taught[~index].loss_mask.any()
        batch = Collator(groups, 2)([sample])
        assert set(batch) - {"weight"} == set(Collator(groups, 2)([plain[index]]))
        if weight:
            wanted = np.where(mask[1:], values[weight][:-1], 0.0)
            assert batch["weight"][0, :-1].tolist() == wanted.astype(np.float32).tolist()


def test_a_random_share_is_that_of_hidden_positions_and_its_complement(cache: Path) -> None:
    """Alone it reads no distribution."""
    reader = CacheReader.open(cache)
    sides = [bound(select, None, cache) for select in ("random<30%", "random>30%", "random<30%,entropy>4")]
    assert [one.specs == (None,) for one in sides] == [True, True, False]
    samples = [[CachedDataset(reader, range(9), SPECS, one)[index] for index in range(9)] for one in sides]
    for index, (below, above, both) in enumerate(zip(*samples, strict=True)):
        mask = reader.read(index, []).loss_mask[1:]
        inside = np.zeros(len(mask) + 1, np.bool_)
        inside[kept_positions(below.id, len(mask) + 1, 0.3, seed=0)] = True
        assert below.loss_mask[1:].tolist() == (mask & inside[:-1]).tolist()
        assert above.loss_mask[1:].tolist() == (mask & ~inside[:-1]).tolist()
        unsure = measures(reader, index)["entropy"][:-1] > 4
        assert both.loss_mask[1:].tolist() == (mask & inside[:-1] & unsure).tolist()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("select", "weight"), [("entropy>4", "surprise"), ("surprise<4", None)])
def test_loss_and_gradients_are_those_of_a_plain_weighted_mean(
    select: str, weight: str | None, pack: bool, cache: Path, teacher: Path
) -> None:
    """Against all positions in float64, of which those that are not selected are multiplied by zero."""
    reader = CacheReader.open(cache)
    whole = CachedDataset(reader, range(7), SPECS)
    taught = CachedDataset(reader, range(7), SPECS, bound(select, weight, cache))
    batch = Collator(SPECS, 2)([whole[index] for index in range(7)])
    student = other_student(teacher)
    weights = []
    for index in range(7):
        values, mask = measures(reader, index), whole[index].loss_mask
        kept = values["entropy"] > 4 if weight else values["surprise"] < 4
        weights.append((np.where(kept, values["surprise"], 0.0) if weight else kept)[:-1][mask[1:]])
    weight_N = torch.from_numpy(np.concatenate(weights).astype(np.float64))
    assert 0 < int((weight_N > 0).sum()) < len(weight_N)
    terms = [(one.double() * weight_N).sum() / weight_N.sum() for one in plain_terms(student, batch)]
    total = sum(w * one for w, one in zip(OBJECTIVE.weights_at(0.0), terms, strict=True))
    total.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    model = DistillationModel(student, OBJECTIVE).train()
    output = model(**Collator(SPECS, 2, pack=pack)([taught[index] for index in range(7)]))
    torch.testing.assert_close(output["terms"].double(), torch.stack(terms).detach(), rtol=1e-4, atol=1e-5)
    output["loss"].backward()
    for name, parameter in student.named_parameters():
        if name in wanted:
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < 2e-4, name


def test_every_kind_of_term_is_weighted_by_position(full_store: Path, teacher: Path) -> None:
    """The gradient is the weighted sum of those of each position alone, also on the full distribution."""
    specs = [LogitsSpec(16), HiddenSpec(3, "f32")]
    from student.training.run import load_teacher

    reader = CacheReader.open(full_store)
    terms = [term("full_jsd", 1.0, (3, 3)), term("reverse_kl", 0.5), term("fisher_mse", 0.3, (3, 3))]
    objective = Objective.of([*terms, term("hidden_cosine", 2.0, (3, 3))])
    taught = CachedDataset(reader, range(2), specs, bound(None, "surprise", full_store))
    batch = Collator(specs, 2)([taught[0], taught[1]])
    student = other_student(teacher)
    model = DistillationModel(student, objective, load_teacher(objective, reader)).train()
    parameters = [student.model.layers[0].mlp.up_proj.weight, student.model.embed_tokens.weight]

    def gradients(**changes: Any) -> list[torch.Tensor]:
        loss = model(**{**batch, **changes})["loss"]
        return list(torch.autograd.grad(loss, parameters))

    weight_BT = batch.pop("weight")
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for b, t in (batch["labels"] != IGNORE).nonzero().tolist():
        labels = torch.full_like(batch["labels"], IGNORE)
        labels[b, t] = batch["labels"][b, t]
        for total, part in zip(sums, gradients(labels=labels, num_items_in_batch=1), strict=True):
            total.add_(part.double(), alpha=weight_BT[b, t].item())
    for one, whole in zip(sums, gradients(weight=weight_BT), strict=True):
        assert (whole * weight_BT.sum() - one).norm() < 1e-4 * one.norm()


def logged(out: Path) -> list[float]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_step_is_the_same_however_it_is_cut(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    flags = ("--select", "surprise<5", "--weight", "entropy", "--ce-weight", 0.5, *SMALL)
    flags += ("--max-steps", 3, "--logging-steps", 1)
    found = {}
    for batch, parts, more in ((8, 1, ()), (4, 2, ()), (1, 8, ()), (8, 1, ("--pack-rows",))):
        out = tmp_path / f"{batch}{len(more)}"
        cut = ("--per-device-train-batch-size", batch, "--gradient-accumulation-steps", parts)
        found[out] = train(out, *flags, *cut, *more)
    first, *others = found
    for out in others:
        assert logged(out) == pytest.approx(logged(first), rel=1e-5)
        assert found[out]["last_eval"]["eval_kl"] == pytest.approx(
            found[first]["last_eval"]["eval_kl"], rel=1e-3
        )


def test_two_processes_take_the_steps_of_one(cache: Path, tmp_path: Path) -> None:
    """Losses of packed rows, of which the processes have more or less to learn."""
    flags = ["--select", "surprise<6", "--weight", "surprise", "--learning-rate", 0.01, "--pack-rows", *SMALL]
    flags += ["--max-steps", 5, "--logging-steps", 1, "--report-to", "none", "--eval-strategy", "no"]

    def words(name: str, batch: int) -> list[str]:
        run = [cache, "--output-dir", tmp_path / name, *flags, "--per-device-train-batch-size", batch]
        return list(map(str, run))

    fed.run(words("one", 8))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCH, "-m", "tests.student.fed", json.dumps([words("two", 4)])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)


def test_held_out_metrics_are_over_all_positions(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Before the first step, students that learn from other positions are measured alike."""
    plain = train(tmp_path / "plain", *SMALL, "--max-steps", 2)
    taught = train(
        tmp_path / "taught", *SMALL, "--max-steps", 2, "--select", "surprise<90%", "--weight", "entropy"
    )
    assert taught["first_eval"] == plain["first_eval"]
    assert taught["last_eval"] != plain["last_eval"] and "curriculum" not in plain
    said = taught["curriculum"].pop("said")
    assert taught["curriculum"] == {"select": "surprise<90%", "weight": "entropy"}
    assert "--select 'surprise<90%' --weight entropy: 9" in said and "of the 31 training samples" in said
    record = json.loads((tmp_path / "taught" / "cache_manifest.json").read_text())
    assert (record["select"], record["weight"]) == ("surprise<90%", "entropy")


def test_a_run_resumes_with_its_own_flags_alone(
    cache: Path, distily_train: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    run = (cache, "--output-dir", tmp_path / "out", *SMALL, "--report-to", "none", "--save-steps", 1)
    taught = ("--select", "surprise<5", "--weight", "entropy")
    code, _, err = distily_train(*run, "--max-steps", 1, *taught)
    assert code == 0, err
    more = (*run, "--max-steps", 2, "--resume-from-checkpoint", "True")
    line = refused("from-cache", *more, "--weight", "entropy")
    assert "--select: " in line and "was trained with --select surprise<5; give that" in line
    line = refused("from-cache", *more, "--select", "surprise<5", "--weight", "surprise")
    assert "--weight surprise: " in line and "was trained with --weight entropy" in line
    code, _, err = distily_train(*more, "--select", "surprise < 5", "--weight", "entropy")
    assert code == 0, err
    plain = tmp_path / "plain"
    code, _, err = distily_train(
        cache, "--output-dir", plain, *SMALL, "--report-to", "none", "--max-steps", 1
    )
    assert code == 0, err
    again = (cache, "--output-dir", plain, *SMALL, "--max-steps", 2, "--resume-from-checkpoint", "True")
    assert "was trained without it; leave it out" in refused("from-cache", *again, "--weight", "entropy")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--select", "loss<3"), "'loss' is no measure; choose entropy, surprise, disagreement"),
        (("--select", "surprise=3"), "'surprise=3' is no condition; write MEASURE<X"),
        (("--select", "surprise<3,"), "'' is no condition"),
        (("--select", "entropy<-1"), "'entropy<-1' is no condition"),
        (("--select", "entropy<100%"), "a quantile above 0% and below 100%"),
        (("--weight", "loss"), "--weight 'loss': 'loss' is no measure"),
        (("--select", "random<0.5"), "give a random share in %, e.g. 'random<25%'"),
        (("--weight", "random"), "'random' is no measure; choose entropy, surprise, disagreement"),
        (("--select", "surprise>90"), "--select 'surprise>90': the measures leave nothing to learn"),
        (("--select", "disagreement>1"), "one teacher agrees with itself; give two STOREs or more"),
        (("--weight", "disagreement"), "--weight disagreement: one teacher agrees with itself"),
    ],
)
def test_what_cannot_be_served_is_refused(
    flags: Sequence[str], words: str, cache: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused("from-cache", cache, "--output-dir", tmp_path / "out", *flags)
    assert flags[0] in line and words in line
    assert not (tmp_path / "out").exists()


def test_caches_that_do_not_know_a_measure_are_refused(
    teacher: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    samples = random_samples(8, 199)
    states = write_cache(tmp_path / "states", teacher, samples, [HiddenSpec(1, "f32")])
    out = ("--output-dir", tmp_path / "out", "--logits-loss", "none", "--ce-weight", 1)
    line = refused("from-cache", states, *out, "--select", "surprise<3")
    assert "--select 'surprise<3': states holds no distributions" in line and "distily-cache generate" in line
    from transformers import AutoModelForCausalLM

    model, spec = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), LogitsSpec(8)
    partial = LogitsSpec(8, partial=True)

    def unknown(sample: Any) -> Any:
        known = features_of(model, sample, [spec])[spec]
        nothing = np.full(len(sample), np.nan, np.float32)
        return {partial: replace(known, entropy=nothing, label_logprob=nothing)}

    imported = write_given_cache(tmp_path / "imported", teacher, samples, unknown)
    line = refused("from-cache", imported, *out, "--weight", "entropy")
    assert "--weight entropy: imported was imported and does not know the teacher's entropy" in line
    line = refused("from-cache", imported, *out, "--select", "surprise<3")
    assert "the measures are not known at any of" in line and "leave the flag out" in line


def test_weights_that_are_all_zero_are_refused(
    teacher: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, spec = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), LogitsSpec(8)

    def certain(sample: Any) -> Any:
        known = features_of(model, sample, [spec])[spec]
        return {spec: replace(known, entropy=np.zeros(len(sample), np.float32))}

    store = write_given_cache(tmp_path / "certain", teacher, random_samples(8, 199), certain)
    line = refused("from-cache", store, "--output-dir", tmp_path / "out", "--weight", "entropy")
    assert (
        "--weight entropy: the entropy is 0 at all that are learned" in line and "leave --weight out" in line
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Path, Path]:
    """Caches of 20 samples each, 16 in both, by teachers of other weights."""
    folder, samples = tmp_path_factory.mktemp("two"), random_samples(24, 199)
    other = Path(shutil.copytree(teacher, folder / "teacher"))
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    moved = {n: w + 0.2 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    whole = [LogitsSpec(199)]
    return (
        write_cache(folder / "a", teacher, samples[:20], whole, digest="aa" * 16),
        write_cache(folder / "b", other, samples[:3:-1], whole, digest="bb" * 16),
    )


@pytest.mark.parametrize("pack", [False, True])
def test_disagreement_is_the_difference_of_the_surprises_of_two_teachers(
    pack: bool, two: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = {"select": "disagreement>0.25,surprise<9", "weight": "disagreement", "pack_rows": pack}
    shape = {"student_model_config": {"num_hidden_layers": 1}, "init": "random", "report_to": "none"}
    experiment = Experiment(two, tmp_path / "out", **flags, **shape, max_steps=1, eval_fraction=0)
    readers = [CacheReader.open(path) for path in two]
    places = {sample: index for index, sample in enumerate(readers[1].sample_ids)}
    data = experiment.trainer.train_dataset
    first = {sample: index for index, sample in enumerate(readers[0].sample_ids)}
    weights = []
    for index in range(len(data)):
        sample = data[index]
        surprises = [measures(readers[0], first[sample.id])["surprise"]]
        surprises.append(measures(readers[1], places[sample.id])["surprise"])
        apart = np.abs(surprises[0] - surprises[1])
        kept = (apart > 0.25) & (surprises[0] < 9)
        mask = readers[0].read(first[sample.id], []).loss_mask
        wanted = np.where(kept[:-1] & mask[1:], apart[:-1], 0.0)
        assert sample.loss_mask[1:].tolist() == (wanted > 0).tolist()
        weights += wanted[wanted > 0].tolist()
    samples = [data[index] for index in range(len(data))]
    batch = collator_of(data, 2, pack, drop_idle=True)(samples)
    assert sorted(batch["weight"][batch["weight"] > 0].tolist()) == pytest.approx(sorted(weights))
    assert (batch["weight"] > 0).equal(batch["labels"] != IGNORE)
    assert experiment.train()["curriculum"]["weight"] == "disagreement"


def test_the_trainer_takes_lists_and_recipes_take_the_flags(
    cache: Path, train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    args = DistillationConfig(
        output_dir=str(tmp_path / "a"),
        select=["surprise<5", "entropy>0.5"],
        student_model_config={"num_hidden_layers": 1},
        report_to="none",
        max_steps=1,
    )
    trainer = DistillationTrainer(args=args, train_dataset=cache)
    assert trainer.train_dataset.record()["select"] == "surprise<5,entropy>0.5"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("select: [surprise<5, entropy>0.5]\nweight: surprise\nmax-steps: 1\n")
    summary = train(tmp_path / "b", "--recipe", recipe, *SMALL)
    assert summary["curriculum"]["select"] == "surprise<5,entropy>0.5"


def test_ties_at_a_quantile_are_on_the_lower_side() -> None:
    (below,), (above,) = parse_select("entropy<50%"), parse_select("entropy>50%")
    from student.data.curriculum import _bounded

    counts = np.array([6, 0, 3, 1])  # in steps of 1/64 nat
    values = np.repeat([0, 2, 3], [6, 3, 1]) / 64
    assert _bounded(below, counts).holds(values).sum() == 6
    assert _bounded(above, counts).holds(values).sum() == 4


def test_a_negative_number_is_not_a_bound() -> None:
    with pytest.raises(UserError, match="is no condition"):
        parse_select("surprise<-3")
