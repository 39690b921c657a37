"""Students with a tokenizer of their own, from a cache of a real teacher's, through the command line."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from featurestore.format.codec import ROW_ERROR
from featurestore.format.schema import HiddenSpec, LogitsFeatures, LogitsSpec, Sample
from featurestore.reader import CacheReader
from student.config.training_config import DistillationConfig
from student.data.batches import IGNORE
from student.modeling.saving import load_student
from student.training.distillation import DistillationTrainer
from tests.student.caches import write_cache
from tests.student.splits import split_samples
from tests.tokenizers import byte_level, own_bpe

Refused = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]

TEXT = (
    "the teacher  learns 12 34\n a student of the cache, naïve café 🙂.\n\n  what it reads, "
    "the student reads too. "
)
WHOLE, HEAD = LogitsSpec(320), LogitsSpec(16)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
)
SHAPE = ["--student-model-config", '{"num_hidden_layers": 1}']
QUICK = ["--per-device-train-batch-size", 4, "--eval-fraction", 0.3, "--report-to", "none", "--max-steps", 2]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return byte_level(directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, writer: Path) -> Path:
    """16 samples of text; two are cut within a character, two learn their second half only."""
    tokenizer, rng = AutoTokenizer.from_pretrained(writer), np.random.default_rng(0)
    samples = []
    for index in range(16):
        words = TEXT.split(" ")
        text = " ".join(words[int(place)] for place in rng.integers(0, len(words), 12))
        ids = tokenizer(text + (" 🙂" if index < 2 else "") + "</s>" * (index % 2)).input_ids
        ids = ids[: -1 if index == 0 else len(ids)]
        mask = np.ones(len(ids), bool)
        mask[: len(ids) // 2 if index in (2, 3) else 1] = False
        samples.append(Sample(tokens=np.array(ids, np.int32), loss_mask=mask))
    path = tmp_path_factory.mktemp("cache") / "store"
    return write_cache(path, writer, samples, [WHOLE, HiddenSpec(1, "f32")])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": own_bpe(folder / "bytes", 257),
        "bpe": own_bpe(folder / "bpe", 285, "what students read, teachers learn; the cache reads 3456."),
    }


@pytest.fixture
def learn(distily_train: Run, store: Path, tokens: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Runs a successful training of a new student with one of the tokenizers; its summary."""

    def run(out: Path, name: str, *flags: object) -> dict[str, Any]:
        own = ["--student-tokenizer", tokens[name], *SHAPE]
        code, printed, err = distily_train(store, "--output-dir", out, *own, *QUICK, "--json", *flags)
        assert code == 0, err
        summary: dict[str, Any] = json.loads(printed)
        return summary

    return run


@torch.no_grad()
def held_out(student: Path, store: Path, teacher: Path) -> dict[str, float]:
    """Nats and bytes of both on the held-out samples, by transformers' models and tokenizers alone: a token
    of the student is learned if its bytes, or its end token, are of learned tokens of the teacher.
    """
    reader = CacheReader.open(store)
    own, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (student, teacher))
    models = [AutoModelForCausalLM.from_pretrained(directory).eval() for directory in (student, teacher)]
    sums = dict.fromkeys(("nats", "bytes", "positions", "teacher_nats", "teacher_bytes"), 0.0)
    for index in split_samples(list(reader.sample_ids), 0.3).held_out:
        sample = reader.read(index, [])
        ids = sample.tokens.astype(np.int64).tolist()
        ended = ids[-1] == 1
        text = theirs.decode(ids[1 : len(ids) - ended])
        assert "\ufffd" not in text, "choose another fraction: samples that are cut are trained on"
        new = [*own(text).input_ids, *([own.eos_token_id] if ended else [])]
        # A letter is a byte; an end token stands for one unit that is none.
        units = [
            len(word) if word[0] != "<" or len(word) == 1 else 1 for word in own.convert_ids_to_tokens(new)
        ]
        given = [0 if i == 0 else 1 if i == 1 else len(theirs.convert_ids_to_tokens(i)) for i in ids]
        learned = np.repeat(sample.loss_mask, given)
        starts = np.cumsum([0, *units])
        chosen = [place for place in range(1, len(new)) if learned[starts[place] : starts[place + 1]].all()]
        log_q, log_p = (
            model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            for model, row in zip(models, (new, ids), strict=True)
        )
        sums["nats"] -= float(sum(log_q[place - 1, new[place]] for place in chosen))
        sums["positions"] += len(chosen)
        sums["bytes"] += sum(units[place] for place in chosen if new[place] != own.eos_token_id)
        for place in np.flatnonzero(sample.loss_mask).tolist():
            sums["teacher_nats"] -= float(log_p[place - 1, ids[place]])
            sums["teacher_bytes"] += given[place] if ids[place] > 1 else 0
    return sums


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_new_student_learns_in_its_own_tokens_and_keeps_its_tokenizer(
    learn: Callable[..., dict[str, Any]],
    distily: Run,
    tmp_path: Path,
    name: str,
    store: Path,
    writer: Path,
    tokens: dict[str, Path],
) -> None:
    out = tmp_path / "student"
    summary = learn(out, name)
    own = AutoTokenizer.from_pretrained(out)
    assert own.get_vocab() == AutoTokenizer.from_pretrained(tokens[name]).get_vocab()
    config = load_student(out).config
    assert (config.vocab_size, config.eos_token_id) == (len(own), own.eos_token_id)
    last, sums = summary["last_eval"], held_out(out, store, writer)
    assert last["eval_ce"] == pytest.approx(sums["nats"] / sums["positions"], rel=1e-4)
    wanted = sums["nats"] / math.log(2) / sums["bytes"]
    assert last["eval_bits_per_byte"] == pytest.approx(wanted, rel=1e-4)
    teacher_bits = sums["teacher_nats"] / math.log(2) / sums["teacher_bytes"]
    assert last["eval_teacher_bits_per_byte"] == pytest.approx(teacher_bits, abs=ROW_ERROR / math.log(2))
    assert "eval_teacher_perplexity" not in last
    seen = summary["tokens_of_both"]
    assert seen["boundary"] + seen["inside"] + seen["labels"] == pytest.approx(1)
    assert seen["written_mass"] > 0.9
    if name == "bytes":
        assert seen["inside"] > 0.1 and seen["counts"]["specials_mapped"] > 0
    # `eval` finds the same.
    code, printed, err = distily("eval", out, "--json")
    assert code == 0, err
    cache = json.loads(printed)["cache"]
    assert cache["student"]["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-5)
    assert cache["student"]["kl"] == pytest.approx(last["eval_kl"], rel=1e-2)
    assert cache["positions"] == sums["positions"]
    code, _, err = distily("eval", out)
    assert code == 0, err
    for command in (["report", out], ["card", out]):
        code, _, err = distily(*command)
        assert code == 0, err


def test_a_checkpoint_with_its_own_tokenizer_goes_on(
    learn: Callable[..., dict[str, Any]], distily_train: Run, tmp_path: Path, store: Path
) -> None:
    first = learn(tmp_path / "first", "bytes")
    code, printed, err = distily_train(
        store, "--output-dir", tmp_path / "next", "--student", tmp_path / "first", *QUICK, "--json"
    )
    assert code == 0, err
    second = json.loads(printed)
    assert second["first_eval"]["eval_bits_per_byte"] == pytest.approx(
        first["last_eval"]["eval_bits_per_byte"], rel=1e-6
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "next").get_vocab()["<end>"] == 0


def test_what_stands_for_the_teachers_ends_ends_a_text(
    distily_train: Run, store: Path, tokens: dict[str, Path], tmp_path: Path
) -> None:
    """Of a student that has a token for it, besides the one that its tokenizer calls the end."""
    own = AutoTokenizer.from_pretrained(tokens["bytes"])
    own.add_special_tokens({"additional_special_tokens": ["</s>"]})
    own.save_pretrained(tmp_path / "own")
    flags = ["--student-tokenizer", tmp_path / "own", *SHAPE, *QUICK]
    code, _, err = distily_train(store, "--output-dir", tmp_path / "student", *flags)
    assert code == 0, err
    ends = sorted((own.eos_token_id, own.convert_tokens_to_ids("</s>")))
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == ends


@pytest.mark.parametrize("kind", ["more", "lower case"])
def test_a_tokenizer_of_the_teachers_vocabulary_that_is_another_one_is_kept(
    distily_train: Run, store: Path, writer: Path, tmp_path: Path, kind: str
) -> None:
    own = AutoTokenizer.from_pretrained(writer)
    if kind == "more":
        own.add_special_tokens({"additional_special_tokens": ["<think>"]})
    else:
        own.backend_tokenizer.normalizer = normalizers.Lowercase()
    own.save_pretrained(tmp_path / "own")
    flags = ["--student-tokenizer", tmp_path / "own", *SHAPE, *QUICK]
    code, _, err = distily_train(store, "--output-dir", tmp_path / "student", *flags)
    assert code == 0, err
    text = "The <think> teacher"
    assert AutoTokenizer.from_pretrained(tmp_path / "student")(text).input_ids == own(text).input_ids


def test_padding_that_is_the_end_is_trained(
    learn: Callable[..., dict[str, Any]], tmp_path: Path, tokens: dict[str, Path]
) -> None:
    own = AutoTokenizer.from_pretrained(tokens["bpe"])
    assert own.pad_token_id == own.eos_token_id
    learn(tmp_path / "student", "bpe")
    assert load_student(tmp_path / "student").get_input_embeddings().padding_idx is None


def test_a_tokenizer_that_autotokenizer_does_not_take_is_said(
    distily_train: Run, distily: Run, writer: Path, tokens: dict[str, Path], tmp_path: Path
) -> None:
    """transformers takes the one of the family for a qwen2, whatever tokenizer_config.json says."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    teacher = tmp_path / "teacher"
    config = Qwen2Config(**{name: getattr(LlamaConfig.from_pretrained(writer), name) for name in SIZES})
    AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    byte_level(teacher)
    samples = [
        Sample(tokens=np.array(ids, np.int32), loss_mask=np.arange(len(ids)) > 0)
        for ids in tokenizer([f"{TEXT}{n}" for n in range(8)]).input_ids
    ]
    cache = write_cache(tmp_path / "store", teacher, samples, [WHOLE])
    out, own = tmp_path / "student", ["--student-tokenizer", tokens["bpe"], *SHAPE]
    code, printed, err = distily_train(cache, "--output-dir", out, *own, *QUICK, "--json")
    assert code == 0, err
    assert "load it with PreTrainedTokenizerFast.from_pretrained" in err
    text, wanted = "two  spaces", AutoTokenizer.from_pretrained(tokens["bpe"])
    kind = getattr(transformers, json.loads(printed)["load_tokenizer_with"])
    assert kind.from_pretrained(out)(text).input_ids == wanted(text).input_ids
    assert distily("card", out)[0] == 0
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained" in (out / "README.md").read_text()


def test_embeddings_start_as_means_of_the_teachers(
    learn: Callable[..., dict[str, Any]], tmp_path: Path, writer: Path
) -> None:
    learn(tmp_path / "student", "bpe", "--learning-rate", 0)
    own, theirs = (AutoTokenizer.from_pretrained(one) for one in (tmp_path / "student", writer))
    rows = load_student(tmp_path / "student").get_input_embeddings().weight.detach()
    whole = AutoModelForCausalLM.from_pretrained(writer).get_input_embeddings().weight.detach()
    for word, index in own.get_vocab().items():
        pieces = (
            [theirs.eos_token_id]
            if word == "<end>"
            else theirs.convert_tokens_to_ids([word])
            if word in theirs.get_vocab()
            else theirs(own.decode([index]), add_special_tokens=False).input_ids
        )
        torch.testing.assert_close(rows[index], whole[pieces].mean(0), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_ends_where_an_unbroken_one_does(
    learn: Callable[..., dict[str, Any]],
    tmp_path: Path,
    refused: Refused,
    store: Path,
    tokens: dict[str, Path],
) -> None:
    whole = learn(tmp_path / "whole", "bpe", "--max-steps", 4, "--save-steps", 2)
    flags = ["--max-steps", 4, "--save-steps", 2, "--resume-from-checkpoint"]
    halfway = tmp_path / "whole" / "checkpoint-2"
    resumed = learn(tmp_path / "resumed", "bpe", *flags, halfway)
    same = ("eval_loss", "eval_kl", "eval_bits_per_byte")
    assert [resumed["last_eval"][name] for name in same] == [whole["last_eval"][name] for name in same]
    other = [store, "--output-dir", tmp_path / "no", "--student-tokenizer", tokens["bytes"], *SHAPE, *QUICK]
    line = refused("from-cache", *other, *flags, halfway)
    assert "was trained with another tokenizer" in line


def test_states_are_compared_where_both_have_read_the_same(
    distily: Run, store: Path, tokens: dict[str, Path], tmp_path: Path
) -> None:
    from student.config.parser import parse
    from student.training.run import build, prepare

    words = [
        store,
        "--output-dir",
        tmp_path / "student",
        "--student-tokenizer",
        tokens["bytes"],
        *SHAPE,
        *QUICK,
    ]
    objective = '{"terms": [{"loss": "hidden_mse", "layer_map": {"1": 1}}]}'
    built = build(prepare(parse([str(word) for word in [*words, "--objective", objective]])))
    model, batch = built.assembled.model, next(iter(built.trainer.get_train_dataloader()))
    found = model.train()(**batch)["terms"]
    with torch.no_grad():
        states = model.student(batch["input_ids"], output_hidden_states=True).hidden_states[1]
    stored = batch["coded_hidden"][1]["values"]
    learned = batch["labels"] != IGNORE
    total = torch.zeros(())
    for b, s in learned.nonzero().tolist():
        if batch["aligned"]["row"][b, s] >= 0 and batch["aligned"]["depth"][b, s] == 0:
            total += (states[b, s] - stored[b, batch["aligned"]["row"][b, s]]).square().mean()
    assert float(found[0]) == pytest.approx(float(total / learned.sum()), rel=1e-4)
    assert float(total) > 0


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_spans_are_as_likely_as_the_teacher_says(
    store: Path, tokens: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Value and gradient, against a loop over the spans and autograd through all logits."""
    from student.config.parser import parse
    from student.training.run import build, prepare

    out = ["--output-dir", tmp_path / "student", "--student-tokenizer", tokens[name]]
    words = [store, *out, *SHAPE, *QUICK, "--logits-loss", "span_likelihood"]
    built = build(prepare(parse([str(word) for word in words])))
    model, data = built.assembled.model.train(), built.assembled.prepared.data.train
    samples = [data[place] for place in range(4)]
    found = model(**built.trainer.data_collator(samples))
    embeddings = model.student.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(found["loss"], embeddings)
    reader, total, count, covered = CacheReader.open(store), torch.zeros(()).double(), 0, 0
    for sample in samples:
        log_q = model.student(torch.tensor(sample.tokens[None].astype(np.int64))).logits[0].double()
        log_q = log_q.log_softmax(-1)
        index = list(reader.sample_ids).index(sample.id)
        features = reader.read(index, [WHOLE]).features[WHOLE]
        assert isinstance(features, LogitsFeatures)
        ends = sample.boundaries_A2.tolist()
        inside: set[int] = set()
        for (t, s), (t_end, s_end) in itertools.pairwise(ends):
            own, theirs = list(range(s + 1, s_end + 1)), list(range(t + 1, t_end + 1))
            if not (sample.loss_mask[own].all() and sample.given.loss_mask[theirs].all()):
                continue
            log_p = sum(float(features.label_logprob[place - 1]) for place in theirs)
            q = torch.stack([log_q[place - 1, sample.tokens[place]] for place in own]).sum().exp()
            p = torch.tensor(log_p).double().clamp(max=-1e-4).exp()
            total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            inside |= set(own)
        learned = np.flatnonzero(sample.loss_mask[1:]) + 1
        count += len(learned)
        covered += len(inside)
        for place in set(learned.tolist()) - inside:
            total = total - log_q[place - 1, sample.tokens[place]]
    (wanted,) = torch.autograd.grad(total / count, embeddings)
    assert float(found["loss"]) == pytest.approx(float(total / count), rel=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
    assert covered > 0.8 * count


def test_plan_and_sweep(
    distily: Run, store: Path, tokens: dict[str, Path], tmp_path: Path, learn: Callable[..., dict[str, Any]]
) -> None:
    own = ["--student-tokenizer", tokens["bytes"], *SHAPE]
    code, printed, err = distily("plan", store, *own, *QUICK, "--json")
    assert code == 0, err
    planned = json.loads(printed)["work"]
    code, printed, err = distily("plan", store, *SHAPE, *QUICK, "--json")
    assert code == 0, err
    assert planned["tokens_per_step"] > 1.2 * json.loads(printed)["work"]["tokens_per_step"]
    spec = tmp_path / "sweep.yaml"
    base = {"student-tokenizer": str(tokens["bpe"]), "student-model-config": {"num_hidden_layers": 1}}
    base |= {"max-steps": 1, "report-to": "none", "eval-fraction": 0.3}
    spec.write_text(json.dumps({"base": base, "grid": {"token-map": ["first", "shared"]}}))
    code, printed, err = distily("sweep", store, spec, "--out", tmp_path / "sweep", "--jobs", 1, "--json")
    assert code == 0, err + printed


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--pack-rows"], "--pack-rows: not supported where the student's tokenizer is not the teacher's"),
        (["--weight", "entropy"], "--weight: not supported where"),
        (["--logits-loss", "tsld"], "tsld needs the teacher's probability of the student's next token"),
        (["--logits-loss", "full_jsd"], "full_jsd"),
        (["--hidden-loss", "similarity"], "compares all positions of a sample with each other"),
        (["--logits-loss", "jsd", "--token-map", "first"], "--token-map first: jsd is not linear"),
        (["--top-k", 4, "--token-map", "first"], "--token-map first: without draws"),
        (
            ["--student-model-config", '{"num_hidden_layers": 1, "vocab_size": 200}'],
            "the student's vocabulary has 200 tokens, and its tokenizer 257",
        ),
        (
            ["--student-model-config", '{"num_hidden_layers": 1, "max_position_embeddings": 16}'],
            "the student takes 16 positions",
        ),
        (
            ["--objective", '{"balance": "gradient_norm", "terms": [{"loss": "kl"}, {"loss": "ce"}]}'],
            "balance: gradient_norm: not supported where",
        ),
        (["--metric-for-best-model", "teacher_perplexity"], "teacher_perplexity: not measured of a student"),
        (["--student", "x"], "--student and --student-tokenizer exclude each other"),
        (["--student-tokenizer", "/nowhere"], "--student-tokenizer /nowhere: transformers cannot load it"),
    ],
)
def test_what_does_not_go_across_tokenizers_is_refused(
    refused: Refused, store: Path, tokens: dict[str, Path], tmp_path: Path, flags: list[str], line: str
) -> None:
    own = [] if "--student" in flags else SHAPE
    words = [store, "--output-dir", tmp_path / "out", "--student-tokenizer", tokens["bytes"], *own, *QUICK]
    assert line in refused("from-cache", *words, *flags)


def test_several_stores_and_idle_flags_are_refused(
    refused: Refused, store: Path, writer: Path, tokens: dict[str, Path], tmp_path: Path
) -> None:
    quick = ["--output-dir", tmp_path / "out", *SHAPE, *QUICK]
    assert "--token-map has no effect" in refused("from-cache", store, *quick, "--token-map", "shared")
    best = ["--metric-for-best-model", "bits_per_byte"]
    assert "bits_per_byte: not measured" in refused("from-cache", store, *quick, *best)
    reader = CacheReader.open(store)
    samples = [reader.read(index, []) for index in range(len(reader))]
    again = [Sample(tokens=one.tokens, loss_mask=one.loss_mask) for one in samples]
    second = write_cache(tmp_path / "second", writer, again, [HEAD], digest="ef" * 16)
    own = ["--student-tokenizer", tokens["bytes"]]
    assert "several STOREs: not supported" in refused("from-cache", store, second, *own, *quick)


def test_loader_processes_and_the_library(
    learn: Callable[..., dict[str, Any]], tmp_path: Path, store: Path, tokens: dict[str, Path], capfd: Any
) -> None:
    alone = learn(tmp_path / "alone", "bpe")
    beside = learn(tmp_path / "beside", "bpe", "--dataloader-num-workers", 2)
    assert beside["last_eval"]["eval_loss"] == alone["last_eval"]["eval_loss"]
    assert "just got forked" not in capfd.readouterr().err
    args = DistillationConfig(
        output_dir=str(tmp_path / "library"),
        student_tokenizer=str(tokens["bpe"]),
        student_model_config={"num_hidden_layers": 1},
        report_to="none",
        max_steps=1,
    )
    own = AutoTokenizer.from_pretrained(tokens["bpe"])
    trainer = DistillationTrainer(args=args, train_dataset=str(store), processing_class=own)
    trainer.train()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "library").get_vocab() == own.get_vocab()


@pytest.mark.parametrize(
    "loss", ["kl", "jsd", "reverse_kl", "tvd", "uld", "soft_mse", "top1", "sinkhorn", "span_likelihood"]
)
def test_losses_on_shared_tokens_fall(
    learn: Callable[..., dict[str, Any]], tmp_path: Path, loss: str
) -> None:
    flags = ["--logits-loss", loss, "--token-map", "shared", "--max-steps", 8, "--learning-rate", 3e-3]
    summary = learn(tmp_path / "out", "bpe", *flags)
    assert summary["last_eval"]["eval_loss"] < summary["first_eval"]["eval_loss"]
