"""What an export says about itself: export_report.json, and the lines that the command prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distily.checkpoint.weights import weights_digest
from student.export.formats import ExportRequest, Format
from student.export.source import ExportSource
from student.export.verify import TOLERANCE, Agreement

REPORT = "export_report.json"

# Below this the best token changes where the student was sure of it, too.
GOOD_AGREEMENT = 0.95


def build(
    request: ExportRequest,
    source: ExportSource,
    written: Path,
    chosen: Format,
    dtype: torch.dtype,
    agreement: Agreement,
    rounding: Agreement,
) -> dict[str, Any]:
    """The report; sizes in bytes. `verification` compares the file, as its reader loads it, with the integer
    reference at stored precision; `rounding` that reference with the student before rounding to it.
    """
    weights = sum(rows * columns for rows, columns in source.shapes.values())
    packed = chosen.ternary_bytes(source)
    return {
        "format": request.format,
        "student": str(request.directory),
        "weights": weights_digest(request.directory),
        "out": str(request.target()),
        "bytes": sum(file.stat().st_size for file in written.iterdir()),
        "dtype": str(dtype).removeprefix("torch."),
        "ternary_layers": len(source.shapes),
        "ternary_weights": weights,
        "bits_per_ternary_weight": 8 * packed / weights,
        "verification": {"reader": chosen.reader(source), "tolerance": TOLERANCE, **asdict(agreement)},
        "rounding": asdict(rounding),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    verified, rounding = report["verification"], report["rounding"]
    return [
        f"{report['out']}: {report['format']}, {report['bytes'] / 1e6:.2f} MB",
        f"  {report['ternary_weights']:,} ternary weights in {report['ternary_layers']} layers at "
        f"{report['bits_per_ternary_weight']:.3f} bits, the rest in {report['dtype']}",
        f"  read back by {verified['reader']}: logits within {verified['relative_error']:.1e} of the integer "
        f"reference (allowed {verified['tolerance']:g}), best token equal at "
        f"{verified['top1_agreement']:.1%} of {verified['positions']} positions",
        f"  against the student as it was trained, before rounding to {report['dtype']}: logits move by "
        f"{rounding['relative_error']:.1e} of their size, best token the same at "
        f"{rounding['top1_agreement']:.1%} of these positions of random tokens; "
        f"{_meaning(rounding['top1_agreement'])}",
    ]


def _meaning(agreement: float) -> str:
    """What to make of how often the best token stays; on random tokens many are near ties."""
    if agreement >= GOOD_AGREEMENT:
        return "100% would be no change, so the export is the student"
    return (
        "100% would be no change: this export is another model than the one that was evaluated (or one that "
        "has learned little, whose best tokens are near ties); compare both with `distily-train eval`"
    )
