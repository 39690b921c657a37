"""A cache that was imported trains: heads alone, unknown labels, positions without a distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from pipeline.interchange.importing import ImportRequest, import_dataset
from tests.pipeline.peers import texts_and_heads, write_axolotl


def test_training_from_an_imported_cache(
    distily_train: Callable[..., tuple[int, str, str]], teacher: Path, tmp_path: Path
) -> None:
    write_axolotl(tmp_path / "rows.parquet", *texts_and_heads(16, 199, 5), prompt=3, own=False)
    request = ImportRequest(
        dataset=str(tmp_path / "rows.parquet"), out=tmp_path / "cache", teacher=str(teacher), layout="axolotl"
    )
    import_dataset(request)
    arguments = [
        "--output-dir",
        tmp_path / "student",
        "--overwrite-output-dir",
        "--max_steps",
        2,
        "--report-to",
        "none",
        "--json",
    ]
    small = ["--student-model-config", '{"num_hidden_layers": 2}', "--eval-fraction", 0.25]
    code, out, err = distily_train(tmp_path / "cache", *arguments, *small, "--ce-weight", 0.1)
    assert code == 0, err
    last = json.loads(out)["last_eval"]
    assert math.isfinite(last["eval_kl"]) and math.isfinite(last["eval_loss"]) and last["eval_kl"] > 0
    # The known labels are the likely ones: a perplexity of them would flatter the teacher.
    assert "eval_teacher_perplexity" not in last
    assert (tmp_path / "student" / "report.html").is_file()
    objective = tmp_path / "objective.yaml"
    objective.write_text("terms: [{loss: tsld}]")
    code, _, err = distily_train(tmp_path / "cache", *arguments, *small, "--objective", objective)
    assert code == 2 and "every next token" in err
    objective.write_text("terms: [{loss: cakld, confidence: 0.5}, {loss: soft_mse}, {loss: uld}]")
    code, out, err = distily_train(tmp_path / "cache", *arguments, *small, "--objective", objective)
    assert code == 0 and math.isfinite(json.loads(out)["last_eval"]["eval_loss"]), err
