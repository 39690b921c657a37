"""A student that starts worse than a uniform guess: it is said, with what may be better."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student.training.uniform import worse_than_uniform

GUESS = math.log(199)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([{"eval_kl": 1.2 * GUESS, "eval_ce": 1.0}], "KL"),
        ([{"eval_kl": 1.0, "eval_ce": 1.2 * GUESS}], "cross-entropy"),
        ([{"grad_norm": 1.0}, {"loss_ce": 1.2 * GUESS}], "cross-entropy"),
        ([{"eval_kl": 1.0, "eval_ce": 1.01 * GUESS}], None),  # a random start lies a little above a guess
        ([{"eval_ce": 1.0}, {"eval_ce": 2 * GUESS}], None),  # that is another fault
        ([{"loss": 99.0}], None),
        ([], None),
    ],
)
def test_the_first_figures_count(log: list[dict[str, float]], said: str | None) -> None:
    line = worse_than_uniform(log, 199, "0,2")
    assert (line is None) == (said is None)
    if line is not None:
        assert said is not None and said in line and f"{GUESS:.3g}" in line
        assert all(word in line for word in ("0,2", "--copy-layers", "--init random"))
        assert "copy" not in (worse_than_uniform(log, 199, None) or "copy")
        ternary = worse_than_uniform(log, 199, "0,2", rounded=True)
        assert ternary is not None and "rounding" in ternary and "copy" not in ternary


def test_a_bad_copy_is_said_once_in_summary_and_report(
    cache: Path, tmp_path: Path, distily_train: Callable[..., tuple[int, str, str]]
) -> None:
    """The tiny teacher without its middle layer has 6.7 nats, a guess 5.3."""
    flags = ["--eval-fraction", 0.25, "--max-steps", 2, "--report-to", "none", "--json"]

    def run(name: str, *more: object) -> tuple[dict[str, Any], str]:
        code, out, err = distily_train(cache, "--output-dir", tmp_path / name, *flags, *more)
        assert code == 0, err
        return json.loads(out), err

    shape = ["--student-model-config", '{"num_hidden_layers": 2}']
    summary, err = run("bad", *shape, "--copy-layers", "uniform")
    assert summary["first_eval"]["eval_ce"] > 1.1 * GUESS
    (line,) = [line for line in err.splitlines() if "uniform guess" in line]
    assert line == f"distily-train: {summary['start_warning']}" and "layers 0,2" in line
    assert "starts worse than a uniform guess" in (tmp_path / "bad" / "report.html").read_text()
    summary, err = run("ternary", *shape, "--copy-layers", "uniform", "--student-model-as-bitnet")
    assert "rounding a teacher's weights to ternary does that" in summary["start_warning"]
    assert "--copy-layers" not in err
    small = '{"num_hidden_layers": 2, "initializer_range": 0.02}'
    summary, err = run("random", "--init", "random", "--student-model-config", small)
    assert summary["start_warning"] is None and "uniform guess" not in err


def test_another_copy_is_taken_where_the_default_breaks(
    cache: Path, tmp_path: Path, distily_train: Callable[..., tuple[int, str, str]]
) -> None:
    """Measured on the starts of eight samples; the list that is named in the line gives the same student."""

    def first_ce(name: str, *flags: object) -> tuple[float, str]:
        code, out, err = distily_train(
            cache, "--output-dir", tmp_path / name, "--eval-fraction", 0.25, "--max-steps", 1, "--json",
            "--report-to", "none", "--student-model-config", '{"num_hidden_layers": 2}', *flags,
        )  # fmt: skip
        assert code == 0, err
        return json.loads(out)["first_eval"]["eval_ce"], err

    found = {layers: first_ce(layers, "--copy-layers", layers) for layers in ("uniform", "first", "last")}
    best = min(found, key=lambda layers: found[layers][0])
    assert best != "uniform" and all("--copy-layers auto" not in err for _, err in found.values())
    chosen, err = first_ce("auto")
    (line,) = [line for line in err.splitlines() if "--copy-layers auto" in line]
    assert chosen == found[best][0] and "layers 0,2 starts at" in line
    assert f"layers {'0,1' if best == 'first' else '1,2'} are copied," in line


def test_the_card_knows_the_teachers_sizes(
    trained: Path, tmp_path: Path, distily: Callable[..., tuple[int, str, str]]
) -> None:
    """From the configuration in the cache, kept in the summary."""
    summary = json.loads((trained / "summary.json").read_text())
    sizes = {"intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert summary["teacher_config"] == sizes
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    code, _, err = distily("card", tmp_path)
    assert code == 0, err
    card = (tmp_path / "README.md").read_text()
    for row in ("| MLP size | 128 | 128 |", "| attention heads | 2 | 2 |", "| key and value heads | 1 | 1 |"):
        assert row in card
