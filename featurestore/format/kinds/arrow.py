"""The types of an export's columns, shared by the kinds: lists of numbers of each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore.format.codec import row_starts

IDS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())


def lists(counts: Sequence[int] | npt.NDArray[Any], values: Any) -> Any:
    """Cut an Arrow array into lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array(row_starts(np.asarray(counts)), pa.int32()), values)


def column_name(kind: str) -> str:
    """`hidden_L2` of hidden.L2, `lse_T0.5` of lse.T0.5."""
    return kind.replace(".", "_", 1)
