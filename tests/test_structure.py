"""The shape of the house: what a room may hold, what an import loads, and what the wheel holds.

Which room may import which is checked by import-linter (`make lint`, contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("distily", "pipeline", "featurestore", "student")
MOST_LOOSE, MOST_IN_A_FOLDER = 8, 16


def modules(package: str) -> list[Path]:
    return [file for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_shadows_our_package(package: str) -> None:
    """`from transformers import pipeline` would be taken for ours."""
    for file in modules(package):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "transformers":
                assert "pipeline" not in {alias.name for alias in node.names}, file


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_stay_small_enough_to_find_a_file_by_its_name(package: str) -> None:
    rooms = defaultdict(list)
    for file in modules(package):
        rooms[file.parent].append(file.name)
    assert rooms
    for room, names in rooms.items():
        limit = MOST_LOOSE if room == ROOT / package else MOST_IN_A_FOLDER
        assert len(names) <= limit, f"{room} holds {len(names)} modules"


def test_no_two_public_classes_share_a_name() -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for file in modules(package):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(file.relative_to(ROOT)))
    assert len(places) > 100
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_docs_use_the_front_door() -> None:
    """Whoever copies from them imports names that are kept."""
    deeper = re.compile(r"\b(?:from|import) (?:featurestore|pipeline|student)\b|\bfrom distily\.")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.ipynb")]
    assert len(pages) > 20
    assert not [f"{page.name}: {line}" for page in pages for line in deeper.findall(page.read_text())]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("distily", ("numpy", "torch", "vllm", "transformers", "featurestore", "pipeline", "student")),
        ("featurestore", ("torch", "vllm", "transformers", "datasets")),
        ("pipeline.cli", ("torch", "vllm", "transformers", "datasets", "numpy", "student")),
        ("student.cli", ("vllm", "pipeline")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_the_four_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(PACKAGES)
