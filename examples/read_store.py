"""Print the teacher's best next tokens for the first sample of a store, with zarr-python and pyarrow alone.

python examples/read_store.py STORE (see docs/FORMAT.md; checks of seals and hashes are left out here)
"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `read_store.py STORE | head` ends with `head`
root = Path(sys.argv[1])
manifests = [json.loads(path.read_text()) for path in sorted(root.glob("MANIFEST-*.json"))]
manifest = max(manifests, key=lambda m: sum(map(len, m["tasks"].values())))
group = next(name for name in manifest["groups"] if name.startswith("logits"))
task = next(task for task, groups in manifest["tasks"].items() if group in groups)
parts = {
    name: root / "parts" / json.loads((root / "commit" / name / f"{task}.json").read_text())["bundle"]
    for name in ("samples", group)
}
sample = pq.read_table(parts["samples"] / "samples.parquet").slice(0, 1).to_pylist()[0]
array = zarr.open_group(str(parts[group] / group), mode="r")
ends = np.cumsum(array["head_count"][: sample["length"]], dtype=np.int64)
for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
    drop = np.cumsum(array["head_gaps"][start:end], dtype=np.int64) / 16
    odds = array["head_odds"][row]
    mass = 1.0 if odds == 32_767 else 1 / (1 + np.exp(-odds / 128))
    p = mass * np.exp(-drop) / np.exp(-drop).sum()
    ids = array["vocabulary"][:][array["head_index"][start:end]]
    best = ", ".join(f"{token}: {probability:.4f}" for token, probability in zip(ids[:5], p, strict=False))
    print(f"after token {sample['tokens'][row]}: {best}; outside the head: {1 - mass:.4f}")
