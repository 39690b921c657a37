"""The student's residual stream at one boundary, for all samples, in a file that is mapped and not loaded.

Shape letters: B batch, T positions, D hidden size, R positions of all samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPE = torch.bfloat16  # its rounding is a hundred times smaller than the error of a ternary block


class Stream:
    """States bfloat16 [R, D], sample after sample, without padding.

    Args:
        path: of the file.
        lengths: positions of each sample.
        width: D.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
        rows = self._starts[-1]
        self._states_RD = torch.from_file(str(path), shared=False, size=rows * width, dtype=DTYPE).view(
            rows, width
        )

    def batch(self, samples: Sequence[int]) -> Tensor:
        """States of some samples, float32 [B, T, D], zeros behind the end of each."""
        rows = [self._states_RD[self._starts[one] : self._starts[one + 1]] for one in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()


def write_stream(path: Path, samples: Iterable[Tensor]) -> None:
    """Write the states of one sample after the other, each [T, D]; the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for states_TD in samples:
                file.write(states_TD.to("cpu", DTYPE).contiguous().view(torch.uint8).numpy().data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
