"""`distily` as others meet it: public names, files that are called as our packages, vLLM beside us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import distily
from tests.command import call

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory of somebody who calls their own files as our packages are called."""
    (tmp_path / "pipeline.py").write_text("raise SystemExit('this is mine')\n")
    for name in ("student.py", "distily_test.py"):
        (tmp_path / name).write_text("MINE = 1\n")
    return tmp_path


def python(code: str, where: Path) -> Done:
    """As in a notebook: the working directory comes first. In no process of a capture, as tests here are."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("DISTILY_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=where, env=outside, capture_output=True, text=True, check=False)


def test_every_public_name_is_there() -> None:
    assert sorted(distily.__all__) == dir(distily)
    for name in distily.__all__:
        assert getattr(distily, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'CacheWriter'"):
        distily.CacheWriter  # noqa: B018


@pytest.mark.parametrize("program", ["distily-cache", "distily-train"])
def test_the_commands_say_their_version(program: str) -> None:
    assert call(program, "--version").stdout == f"{program} {distily.__version__}\n"
    shown = call(program, "--help").stdout
    assert "--version" in shown and "teacher" in shown.split("Options")[0]


def test_a_cache_is_read_beside_files_of_those_names(elsewhere: Path) -> None:
    done = python(
        "from distily import CacheReader, FeatureStore, verify; print(CacheReader.__name__)", elsewhere
    )
    assert (done.returncode, done.stdout) == (0, "CacheReader\n"), done.stderr


def test_a_file_that_hides_a_package_is_named(elsewhere: Path) -> None:
    done = python("from distily import load_student", elsewhere)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"ImportError: {elsewhere / 'student.py'} hides distily-cache's package 'student'")
    assert "rename it" in last


def test_a_vllm_that_is_not_ours_hears_nothing_from_us(elsewhere: Path) -> None:
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins();"
        "loaded = {'pipeline', 'student', 'featurestore'} & set(sys.modules);"
        "print('distily.vllm_plugin' in sys.modules, sorted(loaded))"
    )
    done = python(code, elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True []"
    assert "mine" not in done.stdout + done.stderr
    assert not [line for line in done.stderr.splitlines() if "rror" in line]
