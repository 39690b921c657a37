"""Where a student comes from, for summary.json: command, machine, and the runs that made its cache."""

from __future__ import annotations

import copy
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from distily.safety.redaction import for_record, is_secret
from distily.system.machine import cpu_name


def typed() -> list[str]:
    """The command line of this process, its program without a path."""
    return [PurePath(sys.argv[0]).name, *sys.argv[1:]]


def without_secrets(args: TrainingArguments) -> TrainingArguments:
    """The same arguments to be kept in a file that may be shared: what is secret is None in them, such as the
    hub's token, and texts are without credentials.
    """
    kept = copy.copy(args)
    for name, value in vars(args).items():
        if type(value) in (str, list, dict):
            setattr(kept, name, None if is_secret(name) else for_record(value))
    return kept


def environment(device: torch.device, started: datetime) -> dict[str, Any]:
    """Versions and machine of a training that began at `started` (UTC) on `device`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "started": started.isoformat(timespec="seconds"),
    }


def captures(provenance: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each run that wrote into the cache, oldest first: argv, and what it read. A provenance record is any
    object, so each may be None.
    """
    made = []
    for record in provenance:
        request = record.get("request")
        asked = request if isinstance(request, Mapping) else {}
        wanted = ("dataset", "dataset_config", "split")
        made.append({"argv": record.get("argv"), **{name: asked.get(name) for name in wanted}})
    # Records of older versions hold command lines as they were typed.
    return list(for_record(made))
