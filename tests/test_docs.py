"""README and docs stay true: their commands run, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from student.losses import catalogue
from tests import teachers
from tests.command import MAINS, call
from tests.teachers import text_of
from tests.tokenizers import own_bpe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every line of the page's `bash` blocks; they are written to run one after the other."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def programs(page: Path) -> list[str]:
    """The page's `python` blocks; they are written to run behind its commands."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def run(line: str) -> None:
    """Runs a line in a shell; where it is one of our commands and nothing else, and starts no vLLM, in this
    process, which saves a start of Python.
    """
    words = shlex.split(line)
    starts_vllm = "vllm" in line or ("generate" in words and "--engine" not in words)
    if starts_vllm or words[0] not in MAINS or set(line) & set("|<>;&$`"):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            line, shell=True, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    else:
        done = call(*words, code=None)
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


@pytest.mark.vllm
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_and_programs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers.llama(tmp_path / "my-teacher")
    own_bpe(tmp_path / "my-tokenizer", 257)
    lines = [json.dumps({"text": text_of(60, seed)}) for seed in range(24)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    if (ROOT / "examples").is_dir():
        shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        run(line)
    monkeypatch.setattr(catalogue, "_registered", {})
    for number, program in enumerate(programs(page)):
        exec(compile(program, f"{page.name}, program {number}", "exec"), {"__name__": "__main__"})


def test_no_program_is_left_out() -> None:
    assert [page.name for page in PAGES if programs(page) and not commands(page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_make_targets_of_the_readme_exist_and_ci_runs_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text() + makefile[makefile.index("\nci:") : makefile.index("\nlint:")]
    for target in ("quickstart", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text()
        assert re.search(rf"^{target}:", makefile, flags=re.M)
        assert target in ci
