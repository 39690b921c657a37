"""Losses and engines of another package, found through its entry point by the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import distily.plugins
from distily import CacheReader
from distily.errors import PluginError
from pipeline.engines import registry
from student.losses import catalogue
from tests.command import call
from tests.teachers import llama, text_of

MODULE = """
from distily import Loss, Need, register_engine, register_loss
from pipeline.engines.transformers_engine import TransformersEngine


def l1(student, teacher):
    return (student.float() - teacher.float()).abs().mean(-1)


def register():
    register_loss(Loss(name="hidden_theirs", kind="hidden", function=l1, needs=Need.HIDDEN))
    register_engine("echo", lambda config, verbose: TransformersEngine(config), lambda: "7.5")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a plugin, as pip leaves it."""
    site = tmp_path / "site"
    info = site / "somebodys-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "somebodys.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distily.plugins]\nmine = somebodys:register\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(catalogue, "_registered", {})
    monkeypatch.setattr(registry, "_registered", {})
    distily.plugins.load_plugins.cache_clear()
    yield site
    sys.modules.pop("somebodys", None)
    distily.plugins.load_plugins.cache_clear()


def test_the_commands_know_what_it_registers(package: Path, tmp_path: Path) -> None:
    teacher, texts, store = llama(tmp_path / "teacher"), tmp_path / "texts.jsonl", tmp_path / "store"
    texts.write_text("\n".join(json.dumps({"text": text_of(20, n)}) for n in range(40)))
    flags = ("--engine", "echo", "--max-seq-len", 64, "--hidden-layers", "1")
    call("distily-cache", "generate", teacher, texts, "--out", store, *flags)
    made = CacheReader.open(store).identity
    assert (made.engine, made.engine_version) == ("echo", "7.5")
    again = call(
        "distily-cache", "generate", teacher, texts, "--out", store, "--engine", "transformers", code=2
    )
    assert "echo" in again.stderr
    assert "hidden_theirs" in call("distily-train", "objectives").stdout
    out = tmp_path / "out"
    quick = ("--max-steps", 1, "--report-to", "none", "--json", "--hidden-loss", "theirs")
    summary = json.loads(call("distily-train", "from-cache", store, "--output-dir", out, *quick).stdout)
    assert "hidden_theirs" in json.dumps(summary)


def test_what_a_registered_engine_cannot_do_is_refused(package: Path, tmp_path: Path) -> None:
    teacher, texts = llama(tmp_path / "teacher"), tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": text_of(20, 1)}))
    ask = ("generate", teacher, texts, "--out", tmp_path / "store", "--engine", "echo")
    for flags, message in (
        (["--teacher-load-in-8bit"], "--teacher-load-in-8bit: only for --engine transformers and vllm"),
        (["--continuations", 1], "--continuations: --engine echo writes no text"),
        (["--gpu-memory-utilization", 0.5], "--gpu-memory-utilization: only for --engine vllm"),
    ):
        done = call("distily-cache", *ask, *flags, code=2)
        assert message in done.stderr and done.stderr.count("\n") == 1
    unknown = call("distily-cache", *ask[:-1], "ecko", code=2)
    assert "--engine ecko: choose one of vllm, transformers, echo" in unknown.stderr


def test_a_plugin_that_fails_is_named(package: Path, tmp_path: Path) -> None:
    (package / "somebodys.py").write_text("import no_such_module\n")
    sys.modules.pop("somebodys", None)
    with pytest.raises(PluginError, match="the plugin mine of somebodys failed"):
        distily.plugins.load_plugins()
    done = call("distily-train", "from-cache", tmp_path, "--output-dir", tmp_path / "out", code=1)
    assert "the plugin mine of somebodys failed (ModuleNotFoundError" in done.stderr
    assert done.stderr.count("\n") == 1
