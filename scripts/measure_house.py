"""How easily code is found and read, in numbers: `python scripts/measure_house.py [FOLDER ...]`.

The same numbers can be taken of other projects: give the folders of their packages.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from pathlib import Path

OURS = ("distily", "featurestore", "pipeline", "student")
SHORT, MANY = 60, 6
SECTIONS = ("Args:", "Returns:", "Raises:", "Example")


def main() -> None:
    root = Path(__file__).parents[1]
    folders = [Path(name) for name in sys.argv[1:]] or [root / name for name in OURS]
    rows = [(folder.name, measured(sorted(folder.rglob("*.py")))) for folder in folders]
    if len(folders) > 1:
        files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
        rows.append(("all", measured(files)))
    names = list(rows[0][1])
    print("| |", " | ".join(name for name, _ in rows), "|")  # noqa: T201
    print("|---|" + "---|" * len(rows))  # noqa: T201
    for name in names:
        print(f"| {name} |", " | ".join(found[name] for _, found in rows), "|")  # noqa: T201


def measured(files: list[Path]) -> dict[str, str]:
    modules = [file for file in files if file.name != "__init__.py"]
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in modules]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    total, commented = sum(lines), sum(map(comments, modules))
    documented = [text for tree in trees for text in public_docstrings(tree)]
    structured = sum(any(section in text for section in SECTIONS) for text in documented) / max(
        len(documented), 1
    )
    loose = Counter(file.parent for file in modules)
    return {
        "modules": str(len(modules)),
        "loose modules in the fullest folder": str(max(loose.values())),
        f"modules of at most {SHORT} lines": f"{sum(count <= SHORT for count in lines) / len(lines):.0%}",
        "median / p90 lines of a module": f"{statistics.median(lines):.0f} / {percentile(lines, 0.9)}",
        "comments, share of lines": f"{commented / total:.1%}",
        "public docstrings with Args, Returns, Raises or Example": f"{structured:.0%}",
        f"calls with {MANY} or more positional arguments": str(sum(map(long_calls, trees))),
    }


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[int(share * (len(values) - 1))]


def comments(file: Path) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def public_docstrings(tree: ast.Module) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and not node.name.startswith("_")]
    return [text for node in found if (text := ast.get_docstring(node)) is not None]


def long_calls(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.Call) and len(node.args) >= MANY for node in ast.walk(tree))


if __name__ == "__main__":
    main()
