"""A head as wide as the vocabulary, or by one token narrower: the losses are those of the full distributions.

The first thing that a sceptic compares. Nothing is outside such a head, where the teacher's tail is finite by
the rounding of its logsumexp all the same and the student's is exactly none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from featurestore.format.codec import LOGPROB_ERROR
from featurestore.format.schema import LogitsFeatures, LogitsSpec, LseSpec
from featurestore.reader import CacheReader
from student.data.held_out import is_held_out
from student.losses.sparse import Tempered
from student.objective.terms import term
from tests.student.caches import random_samples, write_cache
from tests.student.test_sparse_losses import CASES, IDS, TEMPERATURE, Problem, definition, lower, run

UNIT = 2.0**-24
ROUNDED_TAIL = -15.9  # log of 2^-23: the mass that a head of everything lacks where lse is off by a rounding


def whole(n: int, v: int, d: int, outside: int = 0, tail: float | None = None) -> Problem:
    """A problem whose heads hold all tokens but the `outside` least likely ones; tail: the log-mass outside
    that the teacher's side gives instead of the true one.
    """
    problem = Problem(n, v, d, 1, seed=3)
    k = v - outside
    logprob, ids = problem.log_p.topk(k)
    tempered = (problem.log_p / TEMPERATURE).log_softmax(-1)
    problem.real = torch.ones(n, k, dtype=torch.bool)
    problem.targets = replace(
        problem.targets,
        ids_NK=ids,
        logprob_NK=logprob,
        tail_N=_outside(problem.log_p, ids, tail),
        tempered={TEMPERATURE: Tempered(tempered.gather(1, ids), _outside(tempered, ids, tail))},
    )
    return problem


def _outside(log_p: Tensor, ids: Tensor, given: float | None) -> Tensor:
    exact = log_p.scatter(1, ids, -math.inf).logsumexp(-1)
    return exact if given is None else torch.full_like(exact, given)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("outside", [0, 1])
@pytest.mark.parametrize("shape", [(1, 2, 3), (7, 199, 5)])
def test_every_loss_is_that_of_the_full_distributions(
    shape: tuple[int, int, int], outside: int, name: str, options: dict[str, Any]
) -> None:
    """In float64; the rounded tail of a head of everything changes nothing that a float32 would show."""
    problem = whole(*shape, outside=outside, tail=None if outside else ROUNDED_TAIL)
    inputs = problem.leaves()
    total, values = run(term(name, **options), inputs, problem.targets)
    wanted = definition(name, options, problem, inputs[0] @ inputs[1].t())
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-9, atol=1e-9)
    got, right = torch.autograd.grad(total, inputs), torch.autograd.grad(wanted.sum(), inputs)
    for own, theirs in zip(got, right, strict=True):
        assert (own - theirs).norm() <= 1e-9 * theirs.norm() + 1e-9


@pytest.mark.parametrize("outside", [0, 1])
@pytest.mark.parametrize("name", ["kl", "cakld", "tsld", "one_for_all", "reverse_kl", "jsd", "tvd", "uld"])
def test_real_vocabulary_in_float32(name: str, outside: int) -> None:
    """Against float64. Logits up to 16 carry errors of 16 units, which exp makes relative ones of every
    probability; sums over V walk at random, for three standard deviations.
    """
    vocabulary = 49_152
    options = {"confidence": 0.3} if name == "cakld" else {}
    exact = whole(3, vocabulary, 17, outside)
    rounded = whole(3, vocabulary, 17, outside, None if outside else ROUNDED_TAIL)
    single, double = exact.leaves(torch.float32), exact.leaves()
    wanted = definition(name, options, exact, double[0] @ double[1].t())
    total, values = run(term(name, **options), single, lower(rounded.targets))
    walk = (64 + 3 * vocabulary**0.5) * UNIT
    torch.testing.assert_close(values.double(), wanted.detach(), rtol=walk, atol=walk)
    found, right = torch.autograd.grad(total, single), torch.autograd.grad(wanted.sum(), double)
    for own, theirs in zip(found, right, strict=True):
        assert (own.double() - theirs).norm() <= walk * theirs.norm()


@pytest.mark.parametrize("name", ["kl", "tsld", "one_for_all"])
def test_a_student_with_padding_rows_is_compared_over_its_own_vocabulary(name: str) -> None:
    """The teacher has no mass on rows that pad the student's head: they only take from the student."""
    problem = whole(5, 199, 4)
    hidden, weight = problem.leaves()
    padded = torch.cat([weight, torch.randn(21, 4, dtype=torch.float64)]).detach().requires_grad_()
    total, values = run(term(name), [hidden, padded], problem.targets)
    log_q = (hidden @ padded.t()).log_softmax(-1)[:, :199]
    p, targets = problem.log_p.exp(), problem.targets
    wanted = (p * (problem.log_p - log_q)).sum(-1)
    if name == "tsld":
        wanted = wanted * targets.token_scale_N
    if name == "one_for_all":
        label = targets.label_N[:, None]
        wanted = -(p * log_q).sum(-1) - log_q.gather(1, label)[:, 0]
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-10, atol=1e-12)
    got, right = (torch.autograd.grad(x, [hidden, padded]) for x in (total, wanted.sum()))
    for own, theirs in zip(got, right, strict=True):
        assert (own - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A store of the tiny teacher (V=199) with all of its logits, also at temperature 2."""
    groups = [LogitsSpec(199), LseSpec(2.0)]
    return write_cache(
        tmp_path_factory.mktemp("complete") / "store", teacher, random_samples(12, 199), groups
    )


def test_a_stored_head_of_everything_has_no_tail(complete: Path) -> None:
    reader = CacheReader.open(complete)
    for index in range(len(reader)):
        features = reader.read(index).features[LogitsSpec(199)]
        assert isinstance(features, LogitsFeatures)
        logprob = features.logits.reshape(-1, 199).astype(np.float64) - features.lse[:, None]
        np.testing.assert_allclose(np.exp(logprob).sum(-1), 1.0, atol=199 * 2 * UNIT * 32)
        (codes,) = reader.read_codes(index, [LogitsSpec(199)]).features.values()
        assert (codes.odds == 32_767).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", ["kl", "cakld", "tsld", "one_for_all"])
@pytest.mark.parametrize("k", [199, 198])
def test_it_trains_and_its_held_out_kl_is_the_dense_one(
    complete: Path,
    teacher: Path,
    tmp_path: Path,
    distily_train: Callable[..., tuple[int, str, str]],
    distily: Callable[..., tuple[int, str, str]],
    loss: str,
    k: int,
) -> None:
    """The held-out KL of the saved student against logits of both models in float64.

    Stored log-probabilities are off by at most LOGPROB_ERROR = e, so that the KL of what is stored is off by
    at most e sum |p| + sum p |exp(e) - 1| |log p - log q|, here below 0.35; typically by e^2 / 24.
    """
    flags = ["--logits-loss", loss, "--top-k", k, "--max-steps", 2, "--eval-fraction", 0.3]
    shape = ["--student-model-config", '{"num_hidden_layers": 2}', "--report-to", "none", "--json"]
    code, out, err = distily_train(complete, "--output-dir", tmp_path / "out", *flags, *shape)
    assert code == 0, err
    summary = json.loads(out)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(math.isfinite(v) for entry in log for v in entry.values() if isinstance(v, float)), log
    models = [
        AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (teacher, tmp_path / "out")
    ]
    nats, positions = 0.0, 0
    reader = CacheReader.open(complete)
    for index, sample_id in enumerate(reader.sample_ids):
        if not is_held_out(sample_id, 0.3):
            continue
        sample = reader.read(index)
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        with torch.no_grad():
            log_p, log_q = (model(tokens).logits[0, :-1].log_softmax(-1) for model in models)
        learned = torch.from_numpy(sample.loss_mask[1:])
        nats += (log_p.exp() * (log_p - log_q)).sum(-1)[learned].sum().item()
        positions += int(learned.sum())
    wanted = nats / positions
    assert summary["last_eval"]["eval_kl"] == pytest.approx(wanted, abs=LOGPROB_ERROR / 4)
    assert summary["held_out_kl"] == "exact"
    if k == 199 and loss == "kl":
        code, out, err = distily(
            "eval", tmp_path / "out", "--cache", complete, "--eval-fraction", 0.3, "--json"
        )
        assert code == 0, err
        cached = json.loads(out)["cache"]
        assert cached["student"]["kl"] == pytest.approx(wanted, abs=LOGPROB_ERROR / 4)
        assert cached["exactness"] == {"kl": "exact", "reverse_kl": "exact"}
