"""The shards that `write_group` writes are, byte by byte, those of zarr-python."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from featurestore.format.arrays import write_group
from featurestore.format.columns import ArrayLayout

SHAPES = [(1,), (7,), (8,), (16,), (29,), (1, 3), (8, 1), (29, 5)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.int64])
@pytest.mark.parametrize("compressed", [True, False])
def test_shards_are_those_of_zarr_python(tmp_path: Path, dtype: npt.DTypeLike, compressed: bool) -> None:
    """Of fewer rows than an inner chunk, of whole chunks, and with a last one that is filled up."""
    layouts = {
        f"a{i}": ArrayLayout(
            shape=shape, dtype=np.dtype(dtype), chunk_rows=8, compressed=compressed, attributes={"n": i}
        )
        for i, shape in enumerate(SHAPES)
    }
    random = np.random.default_rng(3)
    arrays = {name: random.integers(0, 90, layout.shape).astype(dtype) for name, layout in layouts.items()}
    arrays["a6"][:] = 0  # also chunks of the fill value
    with warnings.catch_warnings():
        # A dtype whose Zarr specification is still a draft would warn.
        warnings.simplefilter("error")
        write_group(tmp_path, {}, layouts, arrays)
    shards = {file: file.read_bytes() for file in tmp_path.rglob("0") if file.is_file()}
    assert len(shards) == len(SHAPES)
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(str(tmp_path), mode="a")
        for name, data in arrays.items():
            np.testing.assert_array_equal(group[name][...], data)
            group[name][...] = data
    assert {file: file.read_bytes() for file in shards} == shards
