"""The shape of the house: what imports what, and what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "featurestore", "student")
ALLOWED = {"pipeline": {"featurestore"}, "featurestore": set(), "student": {"featurestore"}}


def imports_of(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every import statement; name is empty for `import module`."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_to_the_store_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for module, name in imports_of(file):
            top = module.split(".")[0]
            assert top not in set(PACKAGES) - {package} - ALLOWED[package], f"{file} imports {module}"
            assert (module, name) != ("transformers", "pipeline"), f"{file} shadows our package"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("featurestore", ("torch", "vllm", "transformers", "datasets")),
        ("pipeline.cli", ("torch", "vllm", "transformers", "datasets", "student")),
        ("student.cli", ("vllm", "pipeline")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_the_three_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(PACKAGES)
