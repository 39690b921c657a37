"""What a run amounted to, as plain data: summary.json."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distily.checkpoint.configs import json_object
from distily.safety.redaction import redact_words
from distily.system.files import write_json
from featurestore.errors import MissingFeatureError
from featurestore.format.schema import LogitsSpec
from featurestore.maintenance.info import StoreInfo, store_info
from featurestore.reader import CacheReader
from student.bitnet import Drift, bit_linears, conversion_of
from student.data.held_out import Split
from student.data.measures import Curriculum
from student.data.stores import CacheStores
from student.data.token_statistics import TokenStatistics
from student.metrics import kl_exactness
from student.modeling.tokenizer import auto_tokenizer_fits
from student.training.model import DistillationModel
from student.training.provenance import captures
from student.training.teachers import measured_words
from student.training.uniform import worse_than_uniform

TEACHER_SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished training. state: Trainer's; seconds: of training with its evaluations; command: the words
    that asked for it; environment: see `student.training.provenance`.
    """

    stores: CacheStores
    model: DistillationModel
    state: Any
    output_dir: Path
    seconds: float
    train_samples: int
    held_out_samples: int
    eval_fraction: float
    command: Sequence[str]
    environment: Mapping[str, Any]
    drift: Drift | None = None  # of the student when it was converted
    split: Split | None = None
    copied: str | None = None  # teacher layers that the student started as a copy of
    curriculum: Curriculum | None = None
    vocab_size: int
    tokens: TokenStatistics | None = None
    blockwise: Mapping[str, Any] | None = None  # how blocks ended that were trained before the whole

    @property
    def reader(self) -> CacheReader:
        """The first cache."""
        return self.stores.first

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """Trainer's log entries of held-out evaluations, oldest first."""
        return [entry for entry in self.state.log_history if "eval_loss" in entry]

    @property
    def training_logs(self) -> list[dict[str, float]]:
        """Trainer's log entries of training steps, oldest first."""
        return [entry for entry in self.state.log_history if "loss" in entry]


def summarise(run: TrainingRun) -> dict[str, Any]:
    """The summary; also written to summary.json in the output directory."""
    evaluations, info = run.evaluations, store_info(run.reader.path)
    rates = [
        entry["train_tokens_per_second"] for entry in run.training_logs if "train_tokens_per_second" in entry
    ]
    summary = {
        "output_dir": str(run.output_dir),
        "report": str(run.output_dir / "report.html"),
        "cache": str(run.reader.path),
        "manifest": run.reader.manifest_digest,
        "steps": run.state.global_step,
        "train_samples": run.train_samples,
        "held_out_samples": run.held_out_samples,
        "eval_fraction": run.eval_fraction,
        "left_out_samples": run.split.left_out if run.split else 0,
        "samples_of_unknown_documents": run.split.unknown if run.split else 0,
        "held_out_kl": _exactness(run.reader),
        "first_eval": _metrics(evaluations[0]) if evaluations else None,
        "start_warning": worse_than_uniform(
            run.state.log_history, run.vocab_size, run.copied, rounded=run.drift is not None
        ),
        "last_eval": _metrics(evaluations[-1]) if evaluations else None,
        "seconds": round(run.seconds, 3),
        "tokens": int(run.state.num_input_tokens_seen),
        "tokens_per_second": round(rates[-1], 1) if rates else None,  # evaluations included in the time
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "objective": {term.label: term.weight.to_json() for term in run.model.objective.terms},
        "bitnet_conversion": conversion_of(run.model.student),
        "step0_drift": asdict(run.drift) if run.drift else None,
        "sizes": _sizes(run),
        "teacher": run.reader.identity.to_json(),
        "teacher_config": teacher_config(run.reader.teacher_dir),
        "cache_cost": cache_cost(run.reader, info),
        "captures": captures(info.provenance),
        "command": redact_words(run.command),
        "environment": dict(run.environment),
    }
    if run.curriculum is not None:
        summary["curriculum"] = {**run.curriculum.record(), "said": run.curriculum.said}
    if run.blockwise is not None:
        summary["blockwise"] = dict(run.blockwise)
    if run.tokens is not None:
        summary["tokens_of_both"] = {**run.tokens.to_json(), "said": str(run.tokens)}
        summary["held_out_kl"] = f"over the student's {_measured_tokens(run)}"
    if not auto_tokenizer_fits(run.output_dir):
        summary["load_tokenizer_with"] = "PreTrainedTokenizerFast"
    if len(run.stores) > 1:
        summary |= _several(run)
    write_json(run.output_dir / "summary.json", summary)
    return summary


def _measured_tokens(run: TrainingRun) -> str:
    return "shared tokens" if run.model.objective.measures_shared else "first tokens"


def _several(run: TrainingRun) -> dict[str, Any]:
    """What there is to say of several caches. The fields of one are the first's, but for what all cost."""
    stores, infos = run.stores, [store_info(reader.path) for reader in run.stores.readers]
    costs = [cache_cost(reader, info) for reader, info in zip(stores.readers, infos, strict=True)]
    moving = [weight.to_json() for weight in run.model.objective.teachers]
    exactness = {_exactness(stores.readers[store]) for store in run.model.objective.measured}
    return {
        "stores": [
            {
                "name": name,
                "cache": str(reader.path),
                "manifest": reader.manifest_digest,
                "weight": weight,
                **({"schedule": course} if run.model.objective.shares_move else {}),
                "samples": len(reader),
                "teacher": reader.identity.to_json(),
                "cache_cost": cost,
                "captures": captures(info.provenance),
            }
            for name, reader, weight, course, cost, info in zip(
                stores.names, stores.readers, stores.weights, moving, costs, infos, strict=True
            )
        ],
        "matched_samples": len(stores.first) - len(stores.missing()),
        "held_out_against": measured_words(run.model.objective, stores),
        # Of a mixture it is exact or unbiased, and unbiased where it is both.
        "held_out_kl": exactness.pop() if len(exactness) == 1 else "unbiased",
        "cache_cost": _joint_cost(stores.names, costs),
    }


def _joint_cost(names: Sequence[str], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the caches cost together; samples and tokens are those of the first, which each teacher read."""
    seconds = [cost["capture_seconds"] for cost in costs]
    rates = [cost["capture_tokens_per_second"] for cost in costs]
    return {
        "teacher": " and ".join(dict.fromkeys(str(cost["teacher"]) for cost in costs)),
        "engine": " and ".join(dict.fromkeys(str(cost["engine"]) for cost in costs)),
        "samples": costs[0]["samples"],
        "tokens": costs[0]["tokens"],
        "bytes": sum(cost["bytes"] for cost in costs),
        "bytes_per_token": round(sum(cost["bytes_per_token"] for cost in costs), 2),
        "capture_seconds": round(sum(seconds), 3) if None not in seconds else None,
        "capture_tokens_per_second": round(1 / sum(1 / rate for rate in rates), 1) if all(rates) else None,
        "groups": {
            f"{name}: {kind}": group
            for name, cost in zip(names, costs, strict=True)
            for kind, group in cost["groups"].items()
        },
    }


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cache_cost(reader: CacheReader, info: StoreInfo) -> dict[str, Any]:
    """What the cache cost: samples, tokens, bytes, and the seconds of its generation, also of
    runs that were stopped, up to their last shard."""
    runs = [record for record in info.runs if "capture_seconds" in record]
    seconds = sum(float(record["capture_seconds"]) for record in runs)
    computed = sum(int(record["tokens"]) for record in runs)
    return {
        "teacher": reader.identity.name,
        "engine": reader.identity.engine,
        "samples": info.samples,
        "tokens": info.rows,
        "bytes": info.bytes,
        "bytes_per_token": round(info.bytes / max(info.rows, 1), 2),
        "capture_seconds": round(seconds, 3) if runs else None,
        "capture_tokens_per_second": round(computed / seconds, 1) if seconds else None,
        "groups": _by_kind(info),
    }


def _by_kind(info: StoreInfo) -> dict[str, dict[str, float]]:
    """Bytes of the column groups of each kind, of which a store may have several."""
    found: dict[str, dict[str, float]] = {}
    for group in info.groups.values():
        known = found.setdefault(group.kind, {"bytes": 0, "bytes_per_token": 0.0})
        known["bytes"] += group.bytes
        known["bytes_per_token"] = round(known["bytes_per_token"] + group.bytes_per_row, 2)
    return found


def teacher_config(directory: Path) -> dict[str, Any]:
    """Sizes of the teacher that its identity does not hold, from its configuration in the cache."""
    config = json_object(directory / "config.json")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and nested else config
    return {name: text[name] for name in TEACHER_SIZES if isinstance(text.get(name), int)}


def _exactness(reader: CacheReader) -> str | None:
    """What a held-out KL from this cache is of the full one: "exact" where the head is the whole vocabulary,
    "unbiased" with draws from the tail, "lower bound" where one bucket stands for it; None where there is
    no KL.
    """
    try:
        logits = reader.find("logits")
    except MissingFeatureError:
        return None
    assert isinstance(logits, LogitsSpec)
    return kl_exactness(logits, reader.identity.vocab_size)


def _metrics(entry: Mapping[str, float]) -> dict[str, float]:
    skipped = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in entry.items() if not name.endswith(skipped)}


def _sizes(run: TrainingRun) -> dict[str, Any]:
    student = run.model.student
    parameters = sum(parameter.numel() for parameter in student.parameters())
    ternary = sum(layer.weight.numel() for _, layer in bit_linears(student))
    return {
        "student_parameters": parameters,
        "ternary_parameters": ternary,
        "ternary_share": round(ternary / parameters, 4),
        "checkpoint_bytes": sum(file.stat().st_size for file in run.output_dir.glob("model*.safetensors")),
    }
