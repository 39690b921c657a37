"""docs/objectives.md and `distily-train objectives` show the catalogue; files are read as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from student.cli import main
from student.errors import UserError
from student.objective.catalogue import catalogue
from student.objective.requests import parse_objective
from student.objective.table import markdown

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_holds_the_table() -> None:
    """Where it does not: `python -m tests.student.test_objectives_page` writes it anew."""
    assert with_table(PAGE.read_text()) == PAGE.read_text()


def with_table(page: str) -> str:
    before, _, rest = page.partition("<!-- table: student/objective/table.py -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    return f"{before}<!-- table: student/objective/table.py -->\n\n{markdown()}\n<!-- end of table -->{after}"


def test_its_files_are_objectives() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) >= 3
    for block in blocks:
        assert parse_objective(yaml.safe_load(block), "page").terms


@pytest.mark.parametrize("words", [["objectives"], ["objectives", "--json"]])
def test_the_command_lists_every_loss(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["distily-train", *words])
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert not stop.value.code
    assert all(name in out for name in catalogue())
    if "--json" in words:
        rows = json.loads(out)
        assert [row["name"] for row in rows] == list(catalogue())
        assert all(row["formula"] and row["statement"] and row["exactness"] for row in rows)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "needs a mapping"),
        ({"terms": []}, "at least one term"),
        ({"terms": [{"loss": "kl"}], "balance": "x"}, "unknown key 'balance'"),
        ({"terms": [{"loss": "skew_kll"}]}, "did you mean skew_kl?"),
        ({"terms": [{"loss": "kl", "weigth": 1}]}, "did you mean weight?"),
        ({"terms": [{"loss": "kl", "weight": -1}]}, "at least 0"),
        ({"terms": [{"loss": "kl", "weight": "1e-3"}]}, "write 1.0e-3"),
        ({"terms": [{"loss": "kl", "temperature": 0}]}, "temperature must be a number from 0.05 to 100"),
        ({"terms": [{"loss": "jsd", "beta": 1}]}, "between 0 and 1"),
        ({"terms": [{"loss": "kl", "layers": [1]}]}, "layers: no key of this loss"),
        ({"terms": [{"loss": "qkv_relation", "projector": "linear"}]}, "projector: no key of this loss"),
        ({"terms": [{"loss": "kl", "weight": {"schedule": "linear", "from": 1}}]}, "needs `to`"),
    ],
)
def test_bad_files_are_refused_by_name(value: object, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        parse_objective(value, "--objective x.yaml")


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
