"""Stores of format version 1, as releases before segments have left them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from featurestore.identity import digest, seal


def as_version_1(path: Path) -> None:
    """Give a store a manifest of version 1 that lists all its commits, in the place of its own."""
    (current,) = path.glob("MANIFEST-*.json")
    newest = json.loads(current.read_bytes())
    tasks: dict[str, dict[str, str]] = {}
    for record in sorted((path / "commit").glob("*/*.json")):
        tasks.setdefault(record.stem, {})[record.parent.name] = digest(record.read_bytes())
    data = seal(
        {
            "format": "distily-cache/manifest",
            "version": 1,
            "spec": digest((path / "SPEC.json").read_bytes()),
            "plans": sorted(plan.name for plan in path.glob("plan-*.parquet")),
            "teacher": newest["teacher"],
            "groups": newest["groups"],
            "tasks": dict(sorted(tasks.items())),
            "stats": {g: t["stats"] for g, t in newest["totals"].items() if t["stats"]},
        }
    )
    current.unlink()
    for folder in ("heads", "segments", "pending"):
        shutil.rmtree(path / folder)
    (path / f"MANIFEST-{digest(data)}.json").write_bytes(data)
