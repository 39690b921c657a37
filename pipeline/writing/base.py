"""What every writer offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.writing.plan import Array, WritingJob

Wrote = Callable[[int, int], None]
"""Told of progress: so many texts more, of so many tokens together."""


class Writer(Protocol):
    """A loaded model that goes on with prompts as its `WriterSpec` says."""

    def write(self, jobs: Sequence[WritingJob], wrote: Wrote) -> list[Array]:
        """The text of each job (int32 [S], S >= 1, without the prompt): up to an end token, or max_tokens."""
        ...

    def close(self) -> None:
        """Release the model's memory; the writer is not used afterwards."""
        ...
