"""The data-set card of a store on the hub: what it is, of which teacher, and how to train from it."""

from __future__ import annotations

from pathlib import Path

from featurestore.maintenance.info import StoreInfo

_TEXT = """---
{head}
---

# Teacher features of {teacher}

A feature store of distily-cache: what the teacher {teacher} computed on {samples:,} samples, {rows:,} tokens,
kept so that students train from it without the teacher.

| | |
|---|---|
| Teacher | {teacher} ({architecture}) |
| Vocabulary, hidden size, layers | {vocab:,}, {hidden:,}, {layers} |
| Computed by | {engine}, {dtype}, quantisation: {quantization} |
| Files | {size:,} bytes |
| Manifest | `{manifest}` |

| Column group | Tokens | Bytes | Bytes per token |
|---|---:|---:|---:|
{groups}

## Train a student from it

```
distily-cache pull {repo} ./store
distily-train from-cache ./store --help
```

`pull` checks every byte against the hash that was committed with it. The file formats are documented with
the project; the viewer of this page does not know them.
"""


def store_card(info: StoreInfo, repo: str, size: int) -> str:
    """README.md in the hub's format. size: bytes of all files pushed."""
    from huggingface_hub import DatasetCardData

    teacher = info.identity
    # A teacher that lies on a disk is named by its path there, which is nobody else's business.
    name = Path(teacher.name).name if Path(teacher.name).is_absolute() else teacher.name
    head = DatasetCardData(
        pretty_name=f"Teacher features of {name}",
        tags=["distily-cache", "distillation", "teacher-features"],
        task_categories=["text-generation"],
        viewer=False,
    )
    groups = "\n".join(
        f"| {group} | {found.rows:,} | {found.bytes:,} | {found.bytes_per_row:,.1f} |"
        for group, found in info.groups.items()
    )
    return _TEXT.format(
        head=head.to_yaml(),
        teacher=name,
        samples=info.samples,
        rows=info.rows,
        architecture=teacher.architecture,
        vocab=teacher.vocab_size,
        hidden=teacher.hidden_size,
        layers=teacher.num_layers,
        engine=f"{teacher.engine} {teacher.engine_version}",
        dtype=teacher.dtype,
        quantization=teacher.quantization,
        size=size,
        manifest=info.manifest,
        groups=groups,
        repo=repo,
    )
