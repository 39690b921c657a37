"""docs/objectives.md and `distily-train objectives` show the catalogue; files are read as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from student.cli import main
from student.cli.objectives import markdown
from student.losses.catalogue import EXACTNESS, catalogue
from student.objective.files import parse_objective

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_holds_the_table() -> None:
    """Where it does not: `python -m tests.student.test_objectives_page` writes it anew."""
    assert with_table(PAGE.read_text()) == PAGE.read_text()


def with_table(page: str) -> str:
    before, _, rest = page.partition("<!-- table: student/cli/objectives.py -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    return f"{before}<!-- table: student/cli/objectives.py -->\n\n{markdown()}\n<!-- end of table -->{after}"


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


def test_entries_are_well_formed() -> None:
    for name, loss in catalogue().items():
        assert loss.exactness in EXACTNESS and not loss.needs & loss.better, name
        assert "\n" not in loss.formula + loss.statement, name
        for option, spec in loss.options.items():
            assert spec.check(spec.default, option) == spec.default and spec.help, (name, option)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
