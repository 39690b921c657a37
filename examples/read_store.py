"""Print the teacher's best next tokens for the first sample of a store, with zarr-python and pyarrow alone.

python examples/read_store.py STORE (see docs/FORMAT.md; checks of seals and hashes are left out here)
"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `read_store.py STORE | head` ends with `head`
root = Path(sys.argv[1])
head = max(path.name for path in (root / "heads").iterdir())
manifest = json.loads((root / f"MANIFEST-{head.split('-')[2]}.json").read_text())
group = next(name for name in manifest["groups"] if name.startswith("logits"))
file = pa.memory_map(str(root / "segments" / f"{manifest['segments'][0]['digest']}.arrow"))
tasks = [task.hex() for task in pa.ipc.open_file(file).read_all()["task"][0].as_py()]
task = next(task for task in tasks if (root / "commit" / group / f"{task}.json").exists())
named = {g: json.loads((root / "commit" / g / f"{task}.json").read_text()) for g in ("samples", group)}
sample = pq.read_table(root / "parts" / named["samples"]["bundle"] / "samples.parquet").to_pylist()[0]
array = zarr.open_group(str(root / "parts" / named[group]["bundle"] / group), mode="r")
ends = np.cumsum(array["head_count"][: sample["length"]], dtype=np.int64)
for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
    drop = np.cumsum(array["head_gaps"][start:end], dtype=np.int64) / 16
    odds = array["head_odds"][row]
    mass = 1.0 if odds == 32_767 else 1 / (1 + np.exp(-odds / 128))
    p = mass * np.exp(-drop) / np.exp(-drop).sum()
    ids = array["vocabulary"][:][array["head_index"][start:end]]
    best = ", ".join(f"{token}: {probability:.4f}" for token, probability in zip(ids[:5], p, strict=False))
    print(f"after token {sample['tokens'][row]}: {best}; outside the head: {1 - mass:.4f}")
