"""Training steps of each kind of student and objective, on one cache, in the precision of `from-cache`.

Each row is a loop of its own: batches as Trainer's loader gives them, AdamW, and for ternary students what
training does for them around a step. A step is timed from the end of the one before, so what it waits for is
part of it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from steps import Step, cached, labels, student
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import enable_tf32

from featurestore.reader import CacheReader
from gpu_check import rows
from gpu_check.measuring import Laps, calls_of, device, fresh_memory, peak_bytes
from gpu_check.prepare import cache_of, teacher_of
from gpu_check.sizes import Size
from student.bitnet import TernaryCallback, TernaryPlan, convert_student
from student.data.batches import CachedDataset, Collator
from student.objective.terms import Objective, Term, term

_RATE = 1e-5
_WORKERS = 4  # of the loader on a GPU, at most, as `from-cache` has them


def measure(row: str, size: Size, folder: Path) -> dict[str, Any]:
    """Seconds of a step, of which of waiting for a batch; peak of memory; launches and waits of a step."""
    kind, objective = rows.parts(row)
    here = device()
    if here.type == "cuda":
        enable_tf32(True)
    fresh_memory()
    model = student(teacher_of(folder), size.student_layers, here.type)
    around = Around(model, kind, size.steps)
    terms = terms_of(objective, size)
    step = make_step(objective, size, folder, terms)(model)
    batches = Batches(cache_of(folder), () if objective == rows.LIVE else terms, size)
    laps, losses = Laps(), []

    def train(count: int) -> None:
        for _ in range(count):
            batch = batches.next(here)
            with torch.autocast(here.type, torch.bfloat16, enabled=here.type == "cuda"):
                loss = step(batch)
            around.update(loss)
            losses.append(loss.detach())
            laps.mark()

    train(size.warm_up)
    batches.waited.clear()
    laps = Laps()
    laps.mark()
    train(size.timed)
    seconds, waited = laps.median(), statistics.median(batches.waited)
    calls = calls_of(lambda: train(size.profiled))
    around.end()
    losses_S = torch.stack(losses)
    if not losses_S.isfinite().all():
        raise ArithmeticError(f"losses that are not finite: {losses_S.tolist()}")
    return {
        "seconds": seconds,
        "waited": waited,
        "tokens": size.batch * size.cached_length,
        "bytes": peak_bytes(),
        "launches": None if calls is None else calls.launches / size.profiled,
        "waits": None if calls is None else calls.waits / size.profiled,
        "first_loss": float(losses_S[0]),
        "last_loss": float(losses_S[-1]),
    }


def terms_of(objective: str, size: Size) -> tuple[Term, ...]:
    """Those of our model; none where transformers' own computes the loss."""
    depths = (size.teacher["num_hidden_layers"], size.student_layers)
    kl, full = term("kl"), term("full_kl", pair=depths)
    hidden = term("hidden_cosine", pair=(size.compared, size.student_layers // 2))
    return {
        rows.LABELS_OF_TRANSFORMERS: (),
        rows.LABELS: (term("ce"),),
        rows.KL: (kl,),
        rows.HIDDEN: (kl, hidden),
        rows.DENSE: (full,),
        rows.LIVE: (full,),
    }[objective]


def make_step(objective: str, size: Size, folder: Path, terms: tuple[Term, ...]) -> Callable[[Any], Step]:
    """From a student to its step."""
    if objective == rows.LABELS_OF_TRANSFORMERS:
        return labels
    from_cache = cached(cache_of(folder), *terms)
    if objective != rows.LIVE:
        return from_cache
    return lambda model: live(from_cache(model), teacher_of(folder), size.teacher["num_hidden_layers"])


def live(dense: Step, path: Path, depth: int) -> Step:
    """The dense step, with states that the teacher computes instead of the cache's."""
    here = device()
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(here).eval().get_decoder()

    def step(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            states_BTD = teacher(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        return dense(batch | {"coded_hidden": {depth: {"values": states_BTD}}})

    return step


class Batches:
    """The cache's samples over and over, with the features that the terms need, as `from-cache` reads them.

    waited: seconds for each batch.
    """

    def __init__(self, cache: Path, terms: tuple[Term, ...], size: Size) -> None:
        reader = CacheReader.open(cache)
        assert (reader.lengths == size.cached_length).all()
        kinds = Objective.of(terms).needs() if terms else frozenset()
        groups = [reader.find(kind) for kind in sorted(kinds)]
        on_gpu = torch.cuda.is_available()
        loader: DataLoader[Any] = DataLoader(
            CachedDataset(reader, range(len(reader)), groups),  # type: ignore[arg-type]
            batch_size=size.batch,
            sampler=[number % len(reader) for number in range(size.steps * size.batch)],
            collate_fn=Collator(groups, 0),
            num_workers=min(_WORKERS, os.cpu_count() or 1) if on_gpu else 0,
            pin_memory=on_gpu,
        )
        self._batches: Iterator[Any] = iter(loader)
        self.waited: list[float] = []

    def next(self, here: torch.device) -> dict[str, Any]:
        """The next one, on the device."""
        began = time.perf_counter()
        batch = next(self._batches)
        self.waited.append(time.perf_counter() - began)
        moved: dict[str, Any] = tree_map(lambda tensor: tensor.to(here, non_blocking=True), batch)
        return moved


class Around:
    """What training does around the loss: the optimizer, and for a ternary student its callback."""

    def __init__(self, model: nn.Module, kind: str, steps: int) -> None:
        self._ternary: TernaryCallback | None = None
        self._arguments = SimpleNamespace(device=device())
        self._state = SimpleNamespace(global_step=0, max_steps=steps)
        if kind != rows.STUDENTS[0]:
            convert_student(model, "none")
            backward = "full" if kind == rows.STUDENTS[1] else "int8"
            self._ternary = TernaryCallback(model, TernaryPlan(backward=backward))
        fused = torch.cuda.is_available()
        self._optimizer = torch.optim.AdamW(model.parameters(), _RATE, fused=fused)
        self._tell("on_train_begin")
        self._tell("on_step_begin")

    def update(self, loss: torch.Tensor) -> None:
        """The rest of a step, and the beginning of the next."""
        loss.backward()
        self._tell("on_pre_optimizer_step")
        self._optimizer.step()
        self._tell("on_optimizer_step")
        self._optimizer.zero_grad()
        self._state.global_step += 1
        self._tell("on_step_begin")

    def end(self) -> None:
        self._tell("on_train_end")

    def _tell(self, what: str) -> None:
        if self._ternary is not None:
            getattr(self._ternary, what)(self._arguments, self._state, None, optimizer=self._optimizer)
