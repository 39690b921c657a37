"""A student whose tokenizer is not the teacher's against what a cache holds of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.data.batches import IGNORE
from student.data.held_out import number_documents
from student.data.matched import collator_of
from student.data.retokenised import OtherTokens, RetokenisedDataset
from student.data.token_map import DeviceMap
from student.objective.other_tokenizer import across_tokenizers
from student.objective.terms import Objective, term
from student.training.model import DistillationModel
from student.training.trainer import held_out_metrics

_UNKNOWN = ("reverse_kl", "reverse_kl_se", "calibration_error")


@torch.no_grad()
def measure_translated(
    student: Any,
    reader: CacheReader,
    indices: Sequence[int],
    spec: LogitsSpec,
    other: OtherTokens,
    batch_size: int,
) -> dict[str, Any]:
    """The `cache` section of eval.json, but for the command: means over the student's learned positions, the
    KL over those at which the teacher has a distribution, and bits per byte of both.

    There is no reverse KL, no calibration and no table by position or entropy: a position of the one is none
    of the other.
    """
    data = RetokenisedDataset(reader, indices, [spec], other)
    objective = across_tokenizers(Objective.of([term("kl")]), spec, spec, reader.identity.vocab_size, None)
    model = DistillationModel(student, objective, tokens=DeviceMap.of(other.tokens)).eval()
    collate, sums, positions = collator_of(data, 0), [], 0
    numbers: dict[str, int] = {}
    documents: list[int] = []
    for start in range(0, len(data), batch_size):
        samples = [data[place] for place in range(start, min(start + batch_size, len(data)))]
        batch = _moved(collate(samples), student.device)
        if bool((batch["labels"] != IGNORE).any()):
            sums.append(model(**batch)["sums"].cpu().numpy())
            documents += number_documents(((one.id, one.documents) for one in samples), numbers)
            positions += int((batch["labels"] != IGNORE).sum())
    prediction = EvalPrediction(predictions=np.concatenate(sums), label_ids=None)
    found = held_out_metrics(documents, prediction)
    shared = objective.measures_shared
    return {
        "path": str(reader.path),
        "manifest": reader.manifest_digest,
        "samples": len(indices),
        "positions": positions,
        "exactness": {"kl": f"over the student's {'shared' if shared else 'first'} tokens"},
        "student": {
            name: found.get(name)
            for name in ("ce", "perplexity", "kl", "kl_se", "top1_agreement", "bits_per_byte")
        }
        | dict.fromkeys(_UNKNOWN),
        "teacher": {"bits_per_byte": found.get("teacher_bits_per_byte")},
        "by_position": [],
        "by_entropy": [],
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device)
