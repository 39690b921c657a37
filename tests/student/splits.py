"""The split of samples that are given as Python lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from student.data.held_out import Split, split_parts

Documents = Sequence[tuple[str, ...]]


def split_samples(
    names: Sequence[str], fraction: float, documents: Sequence[Documents] | None = None
) -> Split:
    """documents: per sample the keys of its documents, once for each task that holds it."""
    known = [list(one) or [()] for one in documents] if documents else [[()]] * len(names)
    first = [copies[0] for copies in known]
    others = [(index, names[index], keys) for index, copies in enumerate(known) for keys in copies[1:]]
    ids = np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 16)
    start = np.cumsum([0, *map(len, first)])
    joined = bytes.fromhex("".join(key for keys in first for key in keys))
    keys = np.frombuffer(joined, np.uint8).reshape(-1, 8)
    # In two parts, as of two segments.
    cut = len(names) // 2
    parts = [
        (ids[:cut], start[: cut + 1], keys[: start[cut]]),
        (ids[cut:], start[cut:] - start[cut], keys[start[cut] :]),
    ]
    return split_parts(len(names), lambda: iter(parts), others, fraction)
