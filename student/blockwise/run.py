"""Training all blocks of a student in the work folder of an output directory, but those that are finished.

The folder holds

- settings.json: what the blocks follow from;
- block-NNN.safetensors: float32 weights by their names in the student, and block-NNN.json, written last: what
  made them, and the errors before and after;
- states-NNN.bin: what goes into block NNN for all samples that are read (`states.Stream`). It follows from
  the blocks before, and is there only while it is needed.

Whatever a kill leaves, the same command begins the first block that has no record anew, from the same states
and seed, so that it ends with the same weights.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments, set_seed

from distily.logs import LOG
from distily.safety.parsing import read_json
from distily.system.files import write_json
from distily.system.stopping import advise
from student.bitnet import norm_epsilon
from student.blockwise.fitting import FitSettings, computing, convert_block, error, fit
from student.blockwise.module import BlockModule
from student.blockwise.plan import Block, drawn
from student.blockwise.reading import BlockReader
from student.blockwise.request import BlockwiseRequest
from student.blockwise.states import Stream, write_stream
from student.data.batches import CALIBRATION_SAMPLES, CachedDataset
from student.errors import UserError

WORK = "blockwise"
SETTINGS = "settings.json"
HELD_OUT = 16  # samples at most by which errors are measured: each is run three times for each block


class BlockwiseRun:
    """The blocks of one request in one output directory.

    Args:
        request: which blocks, from what.
        args: seed, batch size, precision, device, and the output directory.

    Example:
        files = BlockwiseRun(request, args).train(overwrite=False)
    """

    def __init__(self, request: BlockwiseRequest, args: TrainingArguments) -> None:
        self._request, self._args = request, args
        self.folder = Path(args.output_dir) / WORK
        training, held_out = request.split.training, request.split.held_out[:HELD_OUT]
        order = CachedDataset(request.reader, training, ()).epoch_order
        batch = args.per_device_train_batch_size
        steps = drawn(lambda epoch: order(args.seed, epoch), request.steps * batch)
        read = sorted(set(steps))
        place = {sample: number for number, sample in enumerate(read)}
        self._samples = [place[sample] for sample in steps]
        self._indices = [*(training[sample] for sample in read), *held_out]
        first = len(read) if held_out else 0
        self._measured = range(first, min(first + HELD_OUT, len(self._indices)))
        self._on = "held-out" if held_out else "training"

    def train(self, overwrite: bool) -> tuple[Path, ...]:
        """Train the blocks that are not finished.

        Several processes of one launch share the work where blocks do not depend on each other, and wait for
        each other where they do.

        Args:
            overwrite: delete what is in the work folder.

        Returns:
            The files of all blocks, of weights by their names in the student.

        Raises:
            UserError: the folder holds blocks of another request.
            StudentError: a loss is not finite.
        """
        with self._args.main_process_first(local=False, desc="blocks"):
            if self._args.process_index == 0:
                self.open_folder(overwrite)
        blocks = self._request.blocks
        left = [block for block in blocks if not self._record(block).is_file()]
        if 0 < len(left) < len(blocks):
            LOG.info(f"{len(blocks) - len(left)} of {len(blocks)} blocks were finished before")
        independent = self._request.inputs == "teacher"
        for wait in (False, True) if independent else (True,):
            for block in left:
                self._advise(overwrite)
                with self._claimed(block, wait) as ours:
                    if ours and not self._record(block).is_file():
                        self._train(block)
        for file in self.folder.glob("states-*.bin"):
            file.unlink(missing_ok=True)
        return tuple(self._weights(block) for block in blocks)

    def summary(self) -> dict[str, Any] | None:
        """How the blocks ended, for summary.json; None where that is not there any more."""
        records = [self._record(block) for block in self._request.blocks]
        if not all(record.is_file() for record in records):
            return None
        blocks = [_shown(read_json(record)) for record in records]
        return {
            "inputs": self._request.inputs,
            "steps": self._request.steps,
            "learning_rate": self._request.learning_rate,
            "measured_on": f"{len(self._measured)} {self._on} sample{'s' * (len(self._measured) != 1)}",
            "seconds": round(sum(block["seconds"] for block in blocks), 3),
            "blocks": blocks,
        }

    def open_folder(self, overwrite: bool) -> None:
        """Make the folder; UserError where it holds blocks of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            remove_blocks(self.folder)
        path, now = self.folder / SETTINGS, self._request.settings(self._args)
        try:
            was = read_json(path)
        except FileNotFoundError:
            write_json(path, now)
            return
        except ValueError as error_:
            raise UserError(
                f"--output-dir: {path} is damaged ({error_}); give --overwrite-output-dir"
            ) from error_
        changed = next((flag for flag in now if was.get(flag) != now[flag]), None)
        if changed is not None:
            raise UserError(
                f"{changed}: the blocks in {self.folder} were made with {was.get(changed)}, and this run has "
                f"{now[changed]}; give that, another --output-dir, or --overwrite-output-dir to begin anew"
            )

    def _train(self, block: Block) -> None:
        request, args, start = self._request, self._args, time.perf_counter()
        stream = self._stream(block) if request.inputs == "student" else None
        read = BlockReader(request.reader, self._indices, block, request.specs, stream)
        set_seed(args.seed + block.number)
        module = BlockModule(request.plan, block).to(args.device)
        calibrating = sorted(set(self._samples))[:CALIBRATION_SAMPLES]
        assert request.plan.conversion is not None
        eps = norm_epsilon(request.plan.config)
        convert_block(module, request.plan.conversion, eps, read, calibrating, bool(args.bf16))
        measured = _cut(self._measured, args.per_device_eval_batch_size)
        before = error(module, read, measured, bool(args.bf16))
        settings = FitSettings(
            steps=request.steps,
            learning_rate=request.learning_rate,
            batch_size=args.per_device_train_batch_size,
            bf16=bool(args.bf16),
            bar=not args.disable_tqdm,
        )
        fit(module, read, self._samples, settings)
        after = error(module, read, measured, bool(args.bf16))
        weights = {name: weight.detach().cpu().contiguous() for name, weight in module.trained()}
        self._save(block, weights, {"error_before": before, "error_after": after, "start": start})
        LOG.info(
            f"block {block.number + 1} of {len(request.blocks)} ({block}): relative error on {self._on} "
            f"samples {before:.3g} as rounded, {after:.3g} as trained"
        )

    def _save(self, block: Block, weights: dict[str, Tensor], measured: dict[str, float]) -> None:
        path = self._weights(block)
        partial = path.with_name(f".{path.name}.partial")
        save_file(weights, partial)
        partial.replace(path)
        record = {
            **asdict(block),
            "error_before": measured["error_before"],
            "error_after": measured["error_after"],
            "measured_on": self._on,
            "seconds": round(time.perf_counter() - measured["start"], 3),
            "settings": self._request.settings(self._args),
        }
        write_json(self._record(block), record)

    def _stream(self, block: Block) -> Stream | None:
        """What goes into a block, of which the first reads tokens; computed where it is not there."""
        if not block.number:
            return None
        path = self._states(block)
        lengths = self._request.reader.lengths[self._indices].tolist()
        width = self._request.plan.config.get_text_config().hidden_size
        before = self._request.blocks[block.number - 1]
        if not path.is_file():
            write_stream(path, self._outputs(before))
        self._states(before).unlink(missing_ok=True)
        return Stream(path, lengths, width)

    @torch.no_grad()
    def _outputs(self, block: Block) -> Iterator[Tensor]:
        """What a finished block gives, sample by sample."""
        request = self._request
        read = BlockReader(request.reader, self._indices, block, request.specs, self._stream(block))
        module = BlockModule(request.plan, block)
        assert request.plan.conversion is not None
        module.restore(
            request.plan.conversion, norm_epsilon(request.plan.config), load_file(self._weights(block))
        )
        module.to(self._args.device)
        for sample in range(len(self._indices)):
            with computing(self._args.device, bool(self._args.bf16)):
                yield module(read.given(sample).to(self._args.device))[0]

    def _advise(self, overwrite: bool) -> None:
        blocks = self._request.blocks
        done = sum(self._record(block).is_file() for block in blocks)
        then = "--overwrite-output-dir begins them anew" if overwrite else "the same command goes on there"
        advise(f"{done} of {len(blocks)} blocks are finished, {then}")

    @contextmanager
    def _claimed(self, block: Block, wait: bool) -> Iterator[bool]:
        """Whether this process may train a block. The system takes a claim back when its process ends."""
        with (self.folder / f"block-{block.number:03d}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def _weights(self, block: Block) -> Path:
        return self.folder / f"block-{block.number:03d}.safetensors"

    def _record(self, block: Block) -> Path:
        return self.folder / f"block-{block.number:03d}.json"

    def _states(self, block: Block) -> Path:
        return self.folder / f"states-{block.number:03d}.bin"


def remove_blocks(folder: Path) -> None:
    """Delete what a run wrote into its work folder."""
    for pattern in ("block-*", "states-*.bin", ".*.partial", SETTINGS):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    names = ("layers", "target", "error_before", "error_after", "seconds")
    return {name: record[name] for name in names}


def _cut(samples: Sequence[int], size: int) -> list[Sequence[int]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
