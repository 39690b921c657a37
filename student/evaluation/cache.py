"""A student against the teacher that a cache holds; the teacher's model is not needed.

Shape letters: B batch, T positions, N measured positions, V vocabulary.
"""

# ruff: noqa: N815  (shape suffixes on dataclass fields)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featurestore.format.codec import decode_entropy
from featurestore.format.codes import LogitsCodes
from featurestore.format.schema import GroupSpec, LogitsSpec
from featurestore.reader import CacheReader, CodedSample
from student.data.batches import IGNORE, CachedDataset, pad
from student.data.decoding import Transform, decode_hidden, decode_labels, decode_targets
from student.data.held_out import number_documents
from student.data.matched import MatchedDataset, collator_of
from student.data.mixture import mixed_logs, mixture
from student.data.retokenised import OtherTokens
from student.data.stores import CacheStores
from student.data.teacher_weights import bases_on, load_bases, load_parts
from student.evaluation.translated import measure_translated
from student.losses import divergences, full
from student.losses.full_pass import DenseTargets, TeacherHead, dense_head_loss
from student.losses.lm_head import HeadTransform
from student.losses.sparse import ReducedLogits, Reduction, SparseTargets, cross_entropy, forward_kl
from student.losses.sparse_pass import sparse_head_loss
from student.metrics import (
    calibration_error,
    error_of_mean,
    kl_exactness,
    mean,
    means_by,
    perplexity,
    power_edges,
    quantile_edges,
)
from student.training.model import select

Array = npt.NDArray[Any]
ENTROPY_BUCKETS = 8


@dataclass(frozen=True)
class CachePlan:
    """Samples `indices` of a cache, or of several whose teachers are mixed. logits: of each. final: the
    group of the teacher's final states, where a single cache gives the full distribution. other: of a student
    with another tokenizer.
    """

    stores: CacheStores
    indices: Sequence[int]
    logits: tuple[LogitsSpec, ...]
    final: GroupSpec | None = None
    other: OtherTokens | None = None

    @property
    def reader(self) -> CacheReader:
        """The cache, of several the first."""
        return self.stores.first

    @property
    def mixed(self) -> bool:
        """Whether there are several."""
        return len(self.stores) > 1

    @property
    def exactness(self) -> dict[str, str]:
        """What the KL and the reverse KL are: exact (up to the rounding of what is stored), unbiased, or a
        lower bound. There is no reverse KL to a mixture.
        """
        kinds = {kl_exactness(spec, self.reader.identity.vocab_size) for spec in self.logits}
        kl = kinds.pop() if len(kinds) == 1 else "unbiased"
        if self.mixed:
            return {"kl": kl}
        if self.final is not None or kl == "exact":
            return {"kl": "exact", "reverse_kl": "exact"}
        return {"kl": kl, "reverse_kl": "lower bound"}

    @cached_property
    def bases(self) -> dict[str, Transform]:
        """Those of the final states."""
        return load_bases(self.reader)

    @property
    def groups(self) -> list[GroupSpec]:
        """What is read of a sample, of several caches from the first."""
        return [self.logits[0], *([self.final] if self.final else [])]

    def read(self, indices: Sequence[int]) -> list[CodedSample]:
        """Samples of the cache."""
        data = self._data(indices)
        return [data[place] for place in range(len(data))]

    def collate(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        """A batch as trainings have it, with the teacher's `entropy` [B, T], of several the first one's."""
        batch = collator_of(self._data(()), 0)(samples)
        return batch | {"entropy": _entropies(samples, self.logits[0])}

    def _data(self, indices: Sequence[int]) -> CachedDataset:
        if self.mixed:
            return MatchedDataset(self.stores, indices, [[spec] for spec in self.logits])
        return CachedDataset(self.reader, indices, self.groups)


@dataclass(frozen=True, kw_only=True)
class LearnedStates:
    """The positions of a batch that have a label: places in the flattened batch, the student's final states
    there, and what is stored of the teacher, or of several, mixed.
    """

    place_N: Tensor
    states_ND: Tensor
    targets: SparseTargets
    label_logprob_N: Tensor
    mixed: bool
    teacher_ND: Tensor | None


def teacher_head(plan: CachePlan, device: torch.device) -> TeacherHead | None:
    """Of the cache, where it gives the full distribution."""
    return load_parts(plan.reader, plan.final is not None, ()).to(device).head


def measure(student: Any, plan: CachePlan, head: TeacherHead | None, batch_size: int) -> dict[str, Any]:
    """The `cache` section of eval.json, but for the command. Kept in memory: ten numbers per position."""
    if plan.other is not None:
        return measure_translated(
            student, plan.stores.first, plan.indices, plan.logits[0], plan.other, batch_size
        )
    parts = list(_batches(student, plan, head, batch_size))
    return summarise({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, plan)


def summarise(columns: dict[str, Array], plan: CachePlan) -> dict[str, Any]:
    """Means over all positions and by bucket, with standard errors over documents; columns: what `_batches`
    gives, joined.
    """
    ce, teacher_ce = mean(columns["ce"]), mean(columns["teacher_ce"])
    assert ce is not None
    shown = {name: columns[name] for name in ("kl", "ce", "teacher_ce")}
    entropy, known = columns["entropy"], np.isfinite(columns["entropy"])
    edges = quantile_edges(entropy[known], ENTROPY_BUCKETS) if known.any() else [0.0, 0.0]
    return {
        "path": " and ".join(str(reader.path) for reader in plan.stores.readers),
        "manifest": ",".join(plan.stores.manifests),
        **({"mixture": plan.stores.mixture} if plan.mixed else {}),
        "samples": len(plan.indices),
        "positions": len(entropy),
        "exactness": plan.exactness,
        "student": {
            "ce": ce,
            "perplexity": perplexity(ce),
            "kl": mean(columns["kl"]),
            "kl_se": error_of_mean(columns["kl"], columns["document"]),
            "reverse_kl": mean(columns["reverse_kl"]),
            "reverse_kl_se": error_of_mean(columns["reverse_kl"], columns["document"]),
            "top1_agreement": mean(columns["agree"]),
            "calibration_error": calibration_error(columns["confidence"], columns["right"]),
        },
        "teacher": {
            "ce": teacher_ce,
            "perplexity": None if teacher_ce is None else perplexity(teacher_ce),
            "calibration_error": None
            if plan.mixed
            else calibration_error(columns["teacher_confidence"], columns["teacher_right"]),
        },
        "by_position": means_by(
            columns["position"], power_edges(int(columns["position"].max())), shown, columns["document"]
        ),
        "by_entropy": means_by(
            entropy[known], edges, {n: c[known] for n, c in shown.items()}, columns["document"][known]
        ),
    }


def _batches(
    student: Any, plan: CachePlan, head: TeacherHead | None, batch_size: int
) -> Iterator[dict[str, Array]]:
    numbers: dict[str, int] = {}
    for start in range(0, len(plan.indices), batch_size):
        samples = plan.read(plan.indices[start : start + batch_size])
        batch = plan.collate(samples)
        if bool((batch["labels"] != IGNORE).any()):
            columns = measure_batch(student, batch, learned_states(student, batch, plan), head)
            documents = number_documents(((one.id, one.documents) for one in samples), numbers)
            columns["document"] = torch.tensor(documents, device=student.device)[columns.pop("sample")]
            yield {name: column.cpu().numpy() for name, column in columns.items()}


def _entropies(samples: Sequence[CodedSample], group: LogitsSpec) -> Tensor:
    """Of the teacher, float32 [B, T] in nats; NaN where it is not known."""
    codes = [sample.features[group] for sample in samples]
    rows = [decode_entropy(one.entropy) for one in codes if isinstance(one, LogitsCodes)]
    return pad(rows, max(map(len, rows)), np.float32)


@torch.no_grad()
def learned_states(student: Any, batch: dict[str, Any], plan: CachePlan) -> LearnedStates:
    """One pass of the student over a batch of the plan."""
    labels_BT = batch["labels"].to(student.device)
    states_BTD = student.get_decoder()(
        input_ids=batch["input_ids"].to(student.device), use_cache=False
    ).last_hidden_state
    place_N = (labels_BT.flatten() != IGNORE).nonzero().squeeze(1)

    def at(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: select(part.to(student.device), place_N) for name, part in parts.items()}

    label_N = select(labels_BT, place_N)
    coded = [at(one["coded_head"]) for one in (batch, *batch.get("further", {}).values())]
    targets = [decode_targets(one, label_N) for one in coded]
    known = [decode_labels(one["label_logprob"]) for one in coded]
    hidden = next(iter(batch.get("coded_hidden", {}).values()), None)
    return LearnedStates(
        place_N=place_N,
        states_ND=select(states_BTD, place_N),
        targets=mixture(targets, plan.stores.weights) if plan.mixed else targets[0],
        label_logprob_N=mixed_logs(known, plan.stores.weights) if plan.mixed else known[0],
        mixed=plan.mixed,
        teacher_ND=None
        if hidden is None
        else decode_hidden(at(hidden), bases_on(plan.bases, student.device)).float(),
    )


@torch.no_grad()
def measure_batch(
    student: Any, batch: dict[str, Any], read: LearnedStates, head: TeacherHead | None
) -> dict[str, Tensor]:
    """What is measured at each position that has a label, [N] each; head: the teacher's, where the batch
    carries its final states.
    """
    targets, length = read.targets, batch["labels"].shape[1]
    columns = _own(student, read.states_ND, targets, read.mixed)
    if head is not None and read.teacher_ND is not None:
        exact = _exact(student, read.states_ND, DenseTargets(head, read.teacher_ND))
        columns |= dict(zip(("kl", "reverse_kl"), exact, strict=True))
    entropy_N = select(batch["entropy"].to(student.device), read.place_N)
    return columns | {
        "teacher_ce": -read.label_logprob_N,
        "teacher_confidence": targets.logprob_NK[:, 0].exp(),
        "teacher_right": targets.ids_NK[:, 0] == targets.label_N,
        "entropy": targets.entropy_N if read.mixed and targets.entropy_N is not None else entropy_N,
        "position": read.place_N % length,
        "sample": read.place_N // length,
    }


def _own(student: Any, states_ND: Tensor, targets: SparseTargets, mixed: bool) -> dict[str, Tensor]:
    """What the student's logits and the sparse head give, chunk by chunk. The reverse KL to a mixture is
    NaN: it is not linear in it.
    """
    functions = {
        "kl": forward_kl,
        "reverse_kl": _unknown if mixed else divergences.reverse_kl,
        "ce": cross_entropy,
        "confidence": _confidence,
        "right": _right,
    }
    output = student.get_output_embeddings()
    result = sparse_head_loss(
        hidden_ND=states_ND,
        weight_VD=output.weight,
        bias_V=output.bias,
        targets=targets,
        terms=[(function, 0.0) for function in functions.values()],
        transform=HeadTransform.from_config(student.config),
        reduction=Reduction(ranked=True),
    )
    return dict(zip(functions, result.terms_SN, strict=True)) | {"agree": result.agree_N}


def _exact(student: Any, states_ND: Tensor, targets: DenseTargets) -> Tensor:
    """KL and reverse KL over the whole vocabulary, [2, N]."""
    output, terms = student.get_output_embeddings(), [(full.forward_kl, 0.0), (full.reverse_kl, 0.0)]
    transform = HeadTransform.from_config(student.config)
    return dense_head_loss(
        hidden_ND=states_ND,
        weight_VD=output.weight,
        bias_V=output.bias,
        targets=targets,
        terms=terms,
        transform=transform,
    )[1]


def _unknown(student: ReducedLogits, _teacher: SparseTargets) -> Tensor:
    return torch.full_like(student.tail_N, torch.nan)


def _confidence(student: ReducedLogits, _teacher: SparseTargets) -> Tensor:
    """The student's probability of its most likely token, [N]."""
    assert student.top_NK is not None
    return (student.top_NK[:, 0] - student.lse()).exp()


def _right(student: ReducedLogits, _teacher: SparseTargets) -> Tensor:
    """1 where no token is likelier than the label, [N]."""
    assert student.top_NK is not None
    return (student.label_N >= student.top_NK[:, 0]).to(student.label_N.dtype)
