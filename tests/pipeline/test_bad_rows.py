"""Rows that cannot be used: all are counted, refused by default, and dropped where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import cli, generate

TEMPLATE = """{% for m in messages %}
{%- if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}
{%- if '</think>' in m.content %}{{ m.content.split('</think>')[1] }}{% else %}{{ m.content }}{% endif %} </s>
{%- endfor %}"""


def chat(asked: Any, answer: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": asked}, {"role": "assistant", "content": answer}]


GOOD = [chat("a token", "the cache"), chat("of the", "student is")]
BAD: list[Any] = [
    chat("a token", None),
    chat("a token", "the", role="oracle"),
    chat("a token", "<think>a</think>the cache"),
    "the teacher",
    chat("a token", ["the"]),
    [],
    None,
    [{"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}],
]


def lines(path: Path, rows: Sequence[Any], column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tmp_path: Path) -> tuple[object, ...]:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    return ("--chat-template", template)


def refused(*arguments: object) -> str:
    code, _, err = cli("generate", *arguments, "--engine", "transformers")
    found = [line for line in err.splitlines() if line.startswith("distily-cache: ")]
    assert code == 2 and len(found) == 1, err
    return found[0]


def test_bad_chats_are_counted_and_the_first_are_named(
    tiny_teacher: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    data, out = lines(tmp_path / "chats.jsonl", [GOOD[0], *BAD, GOOD[1]]), tmp_path / "store"
    line = refused(tiny_teacher, data, "--out", out, *options)
    assert f"{len(BAD)} rows cannot be used" in line and "--bad-rows drop" in line
    assert "row 1: message 1: content has to be text, it is missing" in line
    assert "row 2: the chat template refuses it: no role oracle" in line
    assert "row 3: the chat template does not write the messages as they are" in line
    assert "row 4" not in line and not out.exists()


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_bad_chats_are_dropped_and_said(
    tiny_teacher: Path, tmp_path: Path, options: tuple[object, ...], loss_on: str
) -> None:
    bad = [row for row in BAD if loss_on == "assistant" or "think" not in str(row)]
    data, out = lines(tmp_path / "chats.jsonl", [GOOD[0], *bad, GOOD[1]]), tmp_path / "store"
    wanted = (*options, "--loss-on", loss_on, "--bad-rows", "drop")
    made = generate(tiny_teacher, data, out, *wanted)
    assert (made["samples"], made["left_out"]["bad_rows"]) == (2, len(bad))
    record = json.loads(cli("info", out, "--json")[1])["provenance"][0]
    assert record["left_out"]["bad_rows"] == len(bad) and record["request"]["bad_rows"] == "drop"
    code, _, err = cli("generate", tiny_teacher, data, "--out", out, "--engine", "transformers", *wanted)
    assert code == 0 and f"left out: {len(bad)} bad rows" in err


def test_one_bad_row_keeps_its_own_line(
    tiny_teacher: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    data = lines(tmp_path / "chats.jsonl", [*GOOD, BAD[0]])
    line = refused(tiny_teacher, data, "--out", tmp_path / "store", *options)
    assert "--messages-column messages: row 2: message 1: content" in line and "--bad-rows drop" in line


def test_nothing_but_bad_rows(tiny_teacher: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    data = lines(tmp_path / "chats.jsonl", BAD[:2])
    line = refused(tiny_teacher, data, "--out", tmp_path / "store", *options, "--bad-rows", "drop")
    assert "2 bad rows" in line and "content has to be text" in line


def test_texts_that_are_none_and_lines_that_are_no_json(tiny_teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(
        '{"text": "the cache learns"}\n{"text": 7}\n{"te\n[1]\n{"text": "a student"}\n{"text": "cut'
    )
    line = refused(tiny_teacher, data, "--out", tmp_path / "store")
    assert "4 rows cannot be used" in line
    assert "row 1: --text-column text: holds int, not text" in line and "row 2: is no JSON" in line
    made = generate(tiny_teacher, data, tmp_path / "store", "--bad-rows", "drop")
    assert (made["samples"], made["left_out"]["bad_rows"]) == (2, 4)


def test_rows_of_a_table(tiny_teacher: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    file = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"messages": [GOOD[0], BAD[0], GOOD[1]]}), file)
    assert "row 1: message 1: content" in refused(tiny_teacher, file, "--out", tmp_path / "store", *options)
    made = generate(tiny_teacher, file, tmp_path / "store", *options, "--bad-rows", "drop")
    assert (made["samples"], made["left_out"]["bad_rows"]) == (2, 1)


def test_the_flag_has_two_values(tiny_teacher: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "texts.jsonl", ["the cache"], "text")
    line = refused(tiny_teacher, data, "--out", tmp_path / "store", "--bad-rows", "fix")
    assert "--bad-rows fix: choose one of refuse, drop" in line


def test_a_template_that_cannot_be_parsed_is_no_bad_row(tiny_teacher: Path, tmp_path: Path) -> None:
    data, template = lines(tmp_path / "chats.jsonl", GOOD), tmp_path / "broken.jinja"
    template.write_text("{% for %}")
    wanted = ("--chat-template", template, "--bad-rows", "drop")
    assert "is no Jinja" in refused(tiny_teacher, data, "--out", tmp_path / "store", *wanted)
