"""`distily-train export`: check, write beside OUT, read back, compare, report, then rename to OUT."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from student.errors import UserError
from student.export import verify
from student.export.formats import DTYPES, ExportRequest, choose
from student.export.report import REPORT, build
from student.export.source import open_source


def export(request: ExportRequest) -> dict[str, Any]:
    """Write the export and return its report.

    Raises UserError for a request that cannot be served, and StudentError when what was written does not
    compute what the student computes; nothing is left behind then.
    """
    chosen, out = choose(request), request.target()
    _check_free(out)
    source = open_source(request.directory)
    chosen.check(source)
    dtype = DTYPES[request.dtype or chosen.dtype]
    ids_BT = verify.probes(source.model.config)
    before = verify.logits_of(source.model, ids_BT)
    chosen.fit(source, dtype)
    reference = verify.logits_of(source.model, ids_BT)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        chosen.write(source, partial, dtype)
        agreement = verify.compare(verify.logits_of(chosen.read(partial, source), ids_BT), reference)
        verify.require(agreement, chosen.reader(source))
        rounding = verify.compare(reference, before)
        report = build(
            request=request,
            source=source,
            written=partial,
            chosen=chosen,
            dtype=dtype,
            agreement=agreement,
            rounding=rounding,
        )
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's own are for one user
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; name another directory or remove it")
