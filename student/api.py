"""For notebooks: what `distily-train from-cache` does, in parts that can be looked at.

Open a store with `featurestore.reader.CacheReader.open`, look into it with `expectations` and the functions
of `featurestore.maintenance.inspect`; an `Experiment` is a training that stands still until it is told to go.

    reader = CacheReader.open("run/cache")
    expectations(reader, 0)
    experiment = Experiment("run/cache", "out", student_model_config={"num_hidden_layers": 2}, max_steps=8)
    batch = next(experiment.batches())
    experiment.losses(batch)
    experiment.train()

Shape letters: B batch, T positions (padded), S terms of the objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from featurestore.maintenance.inspect import look_at
from featurestore.reader import CacheReader
from student.config.flagfile import command_line
from student.config.parser import parse
from student.modeling.tokenizer import load_tokenizer
from student.training.outputs import check_output
from student.training.run import build, prepare, train


def expectations(reader: CacheReader, index: int, limit: int = 20, best: int = 3) -> list[dict[str, Any]]:
    """The first `limit` positions of sample `index` as text, each with what the teacher expected next.

    Args:
        reader: an open store.
        index: of the sample, from 0 to `len(reader) - 1`.
        limit: positions, at most.
        best: how many of the most probable tokens.

    Returns:
        A mapping for each position, with position (int), token and next (str, None behind the last one),
        learned (bool, whether `token` is learned), probability (of `next`, None where the cache does not know
        it), best ([(str, probability)], descending), head_mass (probability inside the stored head) and
        entropy (nats, None where unknown).

    Raises:
        IndexError: there is no such sample.
        MissingFeatureError: not every sample has logits.

    Example:
        for row in expectations(CacheReader.open("run/cache"), 0):
            print(row["token"], row["best"])
    """
    view = look_at(reader, index, limit, best)
    tokenizer = load_tokenizer(reader.teacher_dir)
    return [
        {
            "position": row.position,
            "token": tokenizer.decode([row.token]),
            "learned": row.learned,
            "next": None if row.next_token is None else tokenizer.decode([row.next_token]),
            "probability": row.probability,
            "best": [(tokenizer.decode([token]), probability) for token, probability in row.best],
            "head_mass": row.head_mass,
            "entropy": row.entropy,
        }
        for row in view.rows
    ]


class Experiment:
    """`distily-train from-cache STORE --output-dir DIR`, checked and built but not yet trained.

    Args:
        store: a local directory, s3://bucket/prefix or gs://bucket/prefix; or a list of several, whose
            teachers teach together.
        output_dir: what `train` writes into.
        flags: those of the command, with underscores: learning_rate=1e-3, student_model_as_bitnet=True,
            student_model_config={"num_hidden_layers": 2}, max_steps=8.

    Raises:
        UserError: the command would refuse the flags.
        MissingFeatureError: the store lacks what the objective needs.

    Attributes:
        reader: the store, of several the first.
        trainer: transformers' Trainer, on the device of its `args`.
        model: its module; `model.student` is the student as transformers knows it, `model.objective` what is
            learned.

    Example:
        experiment = Experiment("run/cache", "out", student_model_config={"num_hidden_layers": 2})
        print(experiment.losses(next(experiment.batches())))
        experiment.train()
    """

    def __init__(
        self, store: str | Path | Sequence[str | Path], output_dir: str | Path, **flags: Any
    ) -> None:
        stores = [store] if isinstance(store, (str, Path)) else store
        words = [*map(str, stores), "--output-dir", str(output_dir), *command_line(flags, "Experiment")]
        self._command = ["distily-train", "from-cache", *words]
        request = parse(words)
        check_output(request)
        self._built = build(prepare(request))
        self.reader = self._built.assembled.prepared.reader
        self.model, self.trainer = self._built.assembled.model, self._built.trainer

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches of the first epoch, in the order in which training reads them, on its device.

        Yields:
            input_ids, attention_mask and labels, int64 [B, T] (a label is the token that follows, -100 where
            nothing is learned), and the teacher's features as stored; see `student.data.batches.Collator`.
        """
        return iter(self.trainer.get_train_dataloader())

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses that a training step would compute of a batch.

        Weights are those of the first step, where they move. After `backward`, gradients add to those of
        earlier calls, as always in torch; `train` begins with none.

        Args:
            batch: one of `batches()`.

        Returns:
            "loss", which is differentiable, and each of the S terms under its label, unweighted. All are
            scalars in float32, means over the learned positions.
        """
        self.model.train()
        with self.trainer.compute_loss_context_manager():
            outputs = self.model(**batch)
        terms = dict(zip(self.model.objective.labels, outputs["terms"], strict=True))
        return {"loss": outputs["loss"], **terms}

    def train(self) -> dict[str, Any]:
        """Train, and write student, report.html and summary.json into the output directory.

        Returns:
            What summary.json holds; {} in processes other than the first.

        Raises:
            StudentError: a loss or a weight is not finite, or the checkpoint is not of this student.
        """
        return train(self._built, self._command)
