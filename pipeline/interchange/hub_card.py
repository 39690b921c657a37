"""The data-set card of a store on the hub: what it is, of which teacher, and how to train from it."""

from __future__ import annotations

from distily.safety.markdown import fence, line, section, table, text
from featurestore.maintenance.info import StoreInfo


def store_card(info: StoreInfo, repo: str, size: int) -> str:
    """README.md in the hub's format. size: bytes of all files pushed."""
    from huggingface_hub import DatasetCardData

    # A teacher that lies on a disk is named by its path there, which is nobody else's business.
    name = line(info.identity.name)
    head = DatasetCardData(
        pretty_name=f"Teacher features of {name}",
        tags=["distily-cache", "distillation", "teacher-features"],
        task_categories=["text-generation"],
        viewer=False,
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# Teacher features of {text(name)}",
        f"A feature store of distily-cache: what the teacher {text(name)} computed on {info.samples:,} "
        f"samples, {info.rows:,} tokens, kept so that students train from it without the teacher.",
        _facts(info, size),
        _groups(info),
        section(
            "Train a student from it",
            fence(f"distily-cache pull {repo} ./store\ndistily-train from-cache ./store --help", ""),
            "`pull` checks every byte against the hash that was committed with it. The file formats are "
            "documented with the project; the viewer of this page does not know them.",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(info: StoreInfo, size: int) -> str:
    teacher = info.identity
    engine = f"{teacher.engine} {teacher.engine_version}, {teacher.dtype}"
    rows = [
        ("Teacher", f"{line(teacher.name)} ({teacher.architecture})"),
        (
            "Vocabulary, hidden size, layers",
            f"{teacher.vocab_size:,}, {teacher.hidden_size:,}, {teacher.num_layers}",
        ),
        ("Computed by", f"{engine}, quantisation: {teacher.quantization}"),
        ("Files", f"{size:,} bytes"),
        ("Manifest", info.manifest),
    ]
    return table(("", ""), rows)


def _groups(info: StoreInfo) -> str:
    rows = [
        (group, f"{found.rows:,}", f"{found.bytes:,}", f"{found.bytes_per_row:,.1f}")
        for group, found in info.groups.items()
    ]
    return table(("Column group", "Tokens", "Bytes", "Bytes per token"), rows)
