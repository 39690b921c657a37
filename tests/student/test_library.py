"""The trainer as a script drives it: the same training as the command's, on models that the script brings."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from distily import CacheReader, DistillationConfig, DistillationTrainer, Loss, Need
from featurestore.errors import MissingFeatureError
from student.errors import StudentError, UserError
from student.losses import catalogue
from tests.command import call
from tests.student.caches import random_samples, save_teacher, write_cache
from tests.student.conftest import SPECS
from tests.teachers import word_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "library"
SHAPE = {"num_hidden_layers": 2}
QUICK: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
Config = Callable[..., DistillationConfig]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A short training into `tmp_path / "out"`."""
    return lambda **more: DistillationConfig(**({"output_dir": str(tmp_path / "out"), **QUICK} | more))


def student(teacher: Path, **options: Any) -> Any:
    """The teacher's first two layers, as a model of the script's own."""
    options = {"dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(teacher, num_hidden_layers=2, **options)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_the_training_of_the_command(cache: Path, tmp_path: Path, config: Config) -> None:
    objective = {
        "terms": [{"loss": "jsd", "beta": 0.3}, {"loss": "hidden_mse", "layers": [1], "weight": 0.5}]
    }
    args = config(student_model_config=SHAPE, objective=objective, student_model_as_bitnet=True)
    trainer = DistillationTrainer(args=args, train_dataset=cache)
    trainer.train()
    trainer.save_model()
    flags = {
        "output-dir": tmp_path / "command",
        "student-model-config": json.dumps(SHAPE),
        "objective": json.dumps(objective),
        **{name.replace("_", "-"): value for name, value in QUICK.items()},
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    call("distily-train", "from-cache", cache, *words, "--student-model-as-bitnet")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "command"))


def test_a_model_of_the_script_is_trained_itself(cache: Path, teacher: Path, config: Config) -> None:
    model = student(teacher)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps: list[int] = []

    class Counting(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = DistillationTrainer(
        model=model,
        args=config(),
        train_dataset=CacheReader.open(cache),
        processing_class=tokenizer,
        callbacks=[Counting()],
        optimizers=(optimizer, None),
    )
    assert trainer.processing_class is tokenizer
    trainer.train()
    assert steps == [1, 2, 3, 4] and trainer.optimizer.optimizer is optimizer
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert trainer.evaluate()["eval_kl"] == pytest.approx(trainer.state.log_history[-1]["eval_kl"])


def test_another_cache_is_held_out(cache: Path, teacher: Path, tmp_path: Path, config: Config) -> None:
    """All of it, and all of the first is trained on; the KL is that of its definition in float64."""
    samples = random_samples(9, 199, seed=7)
    held_out = write_cache(tmp_path / "held-out", teacher, samples, SPECS)
    args = config(eval_fraction=0.3, max_steps=16)  # four may go either way, by the random teacher
    trainer = DistillationTrainer(student(teacher), args, cache, held_out)
    assert len(trainer.train_dataset) == len(CacheReader.open(cache)) and len(trainer.eval_dataset) == 9
    assert args.eval_fraction == 0.3, "the caller's own arguments are left alone"
    metrics, model = trainer.evaluate(), student(teacher)
    reader, divergences = CacheReader.open(held_out), []
    for index in range(len(reader)):
        sample = reader.read(index, [reader.find("logits")])
        head = sample.features[reader.find("logits")]
        starts = np.cumsum([0, *head.counts])
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        log_q = model(tokens).logits[0].double().log_softmax(-1).detach().numpy()
        for t in np.flatnonzero(sample.loss_mask[1:]):
            entries = slice(starts[t], starts[t + 1])
            log_p = head.logits[entries].astype(np.float64) - head.lse[t]
            log_head = log_q[t, head.ids[entries]]
            rest = [1 - np.exp(logs).sum() for logs in (log_p, log_head)]
            kl = (np.exp(log_p) * (log_p - log_head)).sum() + rest[0] * np.log(rest[0] / rest[1])
            divergences.append(kl)
    # Logits are stored to 1/32 nat, and float32 rounds in the loss.
    assert metrics["eval_kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    trainer.train()
    measured = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert measured[-1] < metrics["eval_kl"]


def test_what_cannot_be_held_out_is_refused(
    cache: Path, teacher: Path, tmp_path: Path, config: Config
) -> None:
    with pytest.raises(UserError, match=r"eval_dataset: 36 of its 36 samples are in train_dataset"):
        DistillationTrainer(student(teacher), config(), cache, cache)
    samples = random_samples(4, 199, seed=8)
    foreign = write_cache(tmp_path / "foreign", teacher, samples, SPECS, digest="ba" * 16)
    with pytest.raises(UserError, match="eval_dataset: its teacher"):
        DistillationTrainer(student(teacher), config(), cache, foreign)
    poor = write_cache(tmp_path / "poor", teacher, random_samples(4, 199, seed=9), SPECS[:1])
    with pytest.raises(MissingFeatureError, match="--hidden-layers"):
        DistillationTrainer(student(teacher), config(hidden_loss="cosine"), cache, poor)


def test_it_resumes_where_it_stopped(
    cache: Path, teacher: Path, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DistillationTrainer(student(teacher), config(output_dir=str(tmp_path / "whole")), cache)
    whole.train()
    whole.save_model()
    stopped = DistillationTrainer(student(teacher), config(), cache)
    step = DistillationTrainer.training_step

    def stops(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "training_step", stops)
        stopped.train()
    again = DistillationTrainer(student(teacher), config(), cache)
    with pytest.raises(UserError, match="holds a model or a training already"):
        again.train()
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    ended = DistillationTrainer(student(teacher), config(), cache)
    assert ended.train(resume_from_checkpoint=True).global_step == 4
    assert all(
        torch.equal(p, q) for p, q in zip(ended.model.parameters(), again.model.parameters(), strict=True)
    )
    other = DistillationTrainer(student(teacher), config(seed=7), cache)
    with pytest.raises(UserError, match="order of seed 42"):
        other.train(resume_from_checkpoint=True)
    ternary = DistillationTrainer(student(teacher), config(student_model_as_bitnet=True), cache)
    with pytest.raises(UserError, match="full precision"):
        ternary.train(resume_from_checkpoint=True)
    lost = DistillationTrainer(student(teacher), config(overwrite_output_dir=True, max_steps=2), cache)
    lost.train()
    assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint-*"))] == ["checkpoint-2"]


def test_a_grown_cache_is_not_resumed_silently(tmp_path: Path, config: Config) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    store = write_cache(tmp_path / "store", teacher, random_samples(24, 199), SPECS)
    DistillationTrainer(student(teacher), config(max_steps=2), store).train()
    other = write_cache(tmp_path / "other", teacher, random_samples(30, 199, seed=3), SPECS)
    with pytest.raises(UserError, match=r"was trained on manifest .*CacheReader.open"):
        DistillationTrainer(student(teacher), config(), other).train(resume_from_checkpoint=True)


def test_only_adapters_are_trained_and_saved(
    cache: Path, teacher: Path, tmp_path: Path, config: Config
) -> None:
    model = student(teacher)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = DistillationTrainer(model, config(), cache, peft_config=LORA)
    trainer.train()
    trainer.save_model()
    trained = trainer.model.student
    changed = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    assert changed and all(".lora_" in name for name in changed)
    assert any(bool(p.any()) for name, p in changed.items() if "lora_B" in name)  # they begin as zeros
    frozen = {name.removeprefix("base_model.model."): p for name, p in trained.named_parameters()}
    for name, parameter in before.items():
        assert torch.equal(
            frozen.get(name, frozen.get(name.replace("_proj.", "_proj.base_layer."))), parameter
        )
    ids = torch.arange(3, 15)[None]
    expected = trained.eval()(input_ids=ids).logits
    torch.testing.assert_close(
        trained.get_decoder()(input_ids=ids).last_hidden_state @ before_head(before), expected
    )
    config_file = tmp_path / "out" / "adapter_config.json"
    saved = json.loads(config_file.read_text()) | {"base_model_name_or_path": str(teacher)}
    config_file.write_text(json.dumps(saved))
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "out", num_hidden_layers=2, dtype=torch.float32
    )
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected)
    again = DistillationTrainer(student(teacher), config(max_steps=6), cache, peft_config=LORA)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    wider = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "o_proj"])
    with pytest.raises(StudentError, match="adapters are of another student"):
        DistillationTrainer(student(teacher), config(max_steps=6), cache, peft_config=wider).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
        )


def before_head(before: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tied head, [D, V]."""
    return before["model.embed_tokens.weight"].T


def test_what_the_loss_would_not_see_is_refused(cache: Path, teacher: Path, config: Config) -> None:
    for adapters, message in (
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]), "LM head"),
        (
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "LM head",
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "in front of the text"),
    ):
        with pytest.raises(UserError, match=message):
            DistillationTrainer(student(teacher), config(), cache, peft_config=adapters)
    with pytest.raises(UserError, match="BitNet"):
        DistillationTrainer(student(teacher), config(student_model_as_bitnet=True), cache, peft_config=LORA)


def test_bad_arguments(cache: Path, teacher: Path, tmp_path: Path, config: Config) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"args": TrainingArguments(output_dir=str(tmp_path / "out"))}, "give a DistillationConfig"),
        ({"train_dataset": None}, "train_dataset: give a cache"),
        ({"model": student(teacher, dtype=torch.bfloat16)}, "is bfloat16; load it with"),
        ({"processing_class": word_tokenizer(150)}, "processing_class: its vocabulary"),
        ({"model": student(teacher), "args": config(student_model_config=SHAPE)}, "has no effect"),
        ({"model": str(teacher), "args": config(student=str(teacher))}, "names a checkpoint already"),
        ({"model": str(teacher), "args": config(student_model_config=SHAPE)}, "exclude each other"),
        ({"args": config(hidden_loss="mse", hidden_layers=[1, 2])}, "2"),
        (
            {
                "args": config(student_model_as_bitnet=True, bitnet_weight_decay=0.0),
                "optimizers": (torch.optim.SGD([torch.zeros(1)]), None),
            },
            "groups of weights already, and --bitnet-weight-decay",
        ),
    ]
    for given, message in refused:
        with pytest.raises((UserError, MissingFeatureError), match=message):
            DistillationTrainer(**({"args": config(), "train_dataset": cache} | given))
    smaller = student(teacher)
    smaller.resize_token_embeddings(150)
    with pytest.raises(UserError, match="model"):
        DistillationTrainer(smaller, config(), cache)
    for name, value in (("learning_rate", -1.0), ("eval_fraction", 1.5), ("fsdp", "full_shard")):
        with pytest.raises(UserError, match=name.replace("_", "-")):
            trainer = DistillationTrainer(args=config(**{name: value}), train_dataset=cache)
            trainer.train()
    assert not list((tmp_path / "out").glob("*"))


def run_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Path
) -> str:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setenv("DISABLE_TQDM", "1")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_example_of_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher", layers=4)
    samples = random_samples(80, 199, lengths=(60, 120), seed=1)
    store = write_cache(tmp_path / "store", teacher, samples, SPECS)
    printed = run_example("train.py", monkeypatch, capsys, store, tmp_path / "out")
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 25
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.config.num_hidden_layers == 2
    state = json.loads(
        max((tmp_path / "out").glob("checkpoint-*")).joinpath("trainer_state.json").read_text()
    )
    measured = [entry["eval_kl"] for entry in state["log_history"] if "eval_kl" in entry]
    assert min(measured) < 0.95 * measured[0]
    assert f"{min(measured):.3f} nats" in printed


def test_the_example_of_a_loss(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "_registered", {})
    printed = run_example("custom_loss.py", monkeypatch, capsys, cache, tmp_path / "out")
    assert "loss_hidden_huber_L1_to_L1" in printed
    huber = catalogue.catalogue()["hidden_huber"].function
    one, other = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.nn.functional.huber_loss(one, other, delta=2.0, reduction="none").mean(-1)
    torch.testing.assert_close(huber(one, other, delta=2.0), expected)
    with pytest.raises(ValueError, match="exists already"):
        catalogue.register_loss(catalogue.catalogue()["hidden_huber"])
    with pytest.raises(ValueError, match="exists already"):
        catalogue.register_loss(catalogue.catalogue()["kl"])
    for wrong, message in (({"kind": "hiden"}, "kind 'hiden'"), ({"needs": "H"}, "needs 'H'")):
        with pytest.raises(ValueError, match=message):
            catalogue.register_loss(
                Loss(**({"name": "a", "kind": "head", "function": huber, "needs": Need.HEAD} | wrong))
            )


def test_the_example_of_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    store = write_cache(tmp_path / "store", teacher, random_samples(32, 199, seed=1), SPECS)
    torch.manual_seed(0)
    lines = run_example("own_loop.py", monkeypatch, capsys, store).splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
