"""What comes from elsewhere is bounded and harmless, and what is secret is hidden."""

from __future__ import annotations

import io
import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.table import Table

from distily.html.chart import Bar, Series, bar_chart, line_chart
from distily.html.page import code, facts, page, paragraph, section, table
from distily.html.tokens import ENTROPY, Guesses, Word, coloured_text
from distily.logs import LOG, show_on_stderr
from distily.safety import markdown
from distily.safety.console import SafeConsole
from distily.safety.parsing import MAX_DEPTH, MAX_JSON, MAX_NODES, parse_json, parse_yaml, read_json
from distily.safety.redaction import for_record, is_secret, redact, redact_words
from distily.text import one_line, printable
from featurestore.errors import BAD_REQUESTS, StoreFormatError
from featurestore.storage.root import root_of
from pipeline.cli.output import print_json
from student.errors import UserError
from student.yamlfile import read_yaml

# Clears the screen, sets the window's title, C1's CSI, turns text around, isolates, ends a line elsewhere.
STEERING = [
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\x9b31m",
    "\u202e",
    "\u2067",
    "\u2028",
    "\r",
    "\x08",
    "\ud800",
    "\x00",
]
NAMES = [
    '<img src=x onerror="alert(1)">',
    "</title><script>alert(1)</script>",
    "\"' onmouseover=alert(1) x='",
    "<!--",
    "]]><svg onload=alert(1)>",
]


@pytest.mark.parametrize("mark", STEERING)
def test_what_steers_a_terminal_is_written_as_an_escape(mark: str) -> None:
    shown = printable(f"a{mark}b")
    assert shown.isprintable() and shown.isascii() and shown.startswith("a\\") and shown.endswith("b")
    assert printable(shown) == shown
    assert one_line(ValueError(f"a{mark}b")).isprintable()


def test_text_of_people_stays() -> None:
    for text in ("é 日本語 العربية हिन्दी", "👩\u200d🚀", "می\u200cخواهم", "a\u00a0b"):
        assert printable(text) == text
    assert printable("a\n\tb", keep="\n\t") == "a\n\tb"


def test_nothing_reaches_the_terminal_through_a_table() -> None:
    console = SafeConsole(file=io.StringIO(), width=200, color_system=None)
    shown = Table("[red]head", title="".join(STEERING))
    shown.add_row(*["".join(STEERING) + "[bold]cell"])
    console.print(shown)
    console.print("".join(STEERING), highlight=False)
    console.file.seek(0)  # type: ignore[attr-defined]
    written = console.file.read()
    assert all(line.isprintable() for line in written.split("\n"))
    assert "[red]head" in written and "[bold]cell" in written


def test_json_on_the_terminal_has_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"é": ["".join(STEERING), "日本\n語"], "n": 1.5}
    print_json(value)
    written = capsys.readouterr().out
    assert json.loads(written) == value
    assert all(line.isprintable() for line in written.split("\n")) and "日本" in written


def test_a_log_line_is_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        show_on_stderr("prog")
        LOG.warning("from https://me:word@host/x\nprog: done\x1b[2J")
    finally:
        LOG.handlers.clear()
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and "\x1b" not in written and "word" not in written


SECRETS = [
    "https://me:hunter22@host:1/x",
    "http://me:hun@ter22@host/x",
    "s3://bucket/x?X-Amz-Credential=hunter22&X-Amz-Signature=hunter22",
    "https://host/x?part=1&sig=hunter22#top",
    "https://host/x?AWSAccessKeyId=hunter22;Signature=hunter22",
    "--hub-token hunter22",
    "--hub_token=hunter22",
    "AWS_SECRET_ACCESS_KEY=hunter22",
    "aws_session_token=hunter22",
    '{"api_key": "hunter22", "a": 1}',
    "{'password': 'hunter22'}",
    "Authorization: Bearer hunter22",
    "hf_hunter22hunter22hunter22",
    "AKIAHUNTER22HUNTER22",
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_are_hidden(text: str) -> None:
    for shown in (redact(text), one_line(ValueError(f"cannot read {text}: 404")), markdown.line(text)):
        assert "hunter22" not in shown.lower() and "***" in shown
    words = [text] if text[0] == "{" else text.split(" ", 1)
    recorded = json.dumps(for_record({"argv": ["prog", *words], "text": text, "deep": [[text, 1]]}))
    assert "hunter22" not in recorded.lower()


def test_long_texts_are_looked_at_once() -> None:
    """A pattern that begins anew at each letter would take hours; this is no measurement."""
    began = time.process_time()
    for text in (
        "a" * 200_000 + "://@",
        "a=" * 100_000 + "://",
        "'a" * 100_000 + ":",
        "--a-" * 50_000 + " =:",
        "/a" * 100_000,
    ):
        redact(text)
        markdown.text(text)
    assert time.process_time() - began < 60


def test_what_is_no_secret_stays() -> None:
    words = [
        "prog",
        "--shard-tokens",
        "5",
        "--lr=1",
        "data/key.json",
        "a@b.c",
        "s3://b/x?y=1",
        "eos_token=<s>",
    ]
    assert redact_words(words) == words
    record = {
        "tokens": 5,
        "key": 3,
        "token_id": "x",
        "tokenizer": "t",
        "pad_token": "p",
        "none": None,
        "f": 1.5,
    }
    assert for_record(record) == record
    for name in ("tokens", "tokenizer", "monkey", "max_num_batched_tokens", "token_id", "eos_token", "keys"):
        assert not is_secret(name)


def test_what_the_environment_keeps_is_in_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.internal:9000")
    monkeypatch.setenv("HF_TOKEN", "not-of-a-known-shape")
    words = ["prog", "http://minio.internal:9000/b", "--x=not-of-a-known-shape"]
    assert redact_words(words) == ["prog", "***/b", "--x=***"]
    assert for_record({"out": words[1]}) == {"out": "***/b"}


@pytest.mark.parametrize(
    "url",
    ["s3://me:hunter22@bucket/x", "s3://bucket/x?X-Amz-Signature=hunter22", "gs://b/x?access_token=hunter22"],
)
def test_a_stores_url_holds_no_credentials(url: str) -> None:
    """It stands in records, reports and cards."""
    with pytest.raises(StoreFormatError, match="holds credentials or a signature") as caught:
        root_of(url)
    assert "hunter22" not in str(caught.value) and isinstance(caught.value, BAD_REQUESTS)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_names_make_no_element_and_no_attribute_in_a_page() -> None:
    def made(name: str) -> _Tags:
        guess = Guesses(who=name, remark=name, best=[(name, 0.5)], actual=0)
        word = Word(text=name, values=(0.1,), title=name, guesses=[guess])
        found = _Tags()
        found.feed(
            page(
                name,
                paragraph(name),
                section(
                    name,
                    code(name),
                    table([name], [[name]], name, sortable=True),
                    facts([(name, name)], name),
                ),
                line_chart(name, [Series(name, [(1, 2), (2, 3)]), Series("b", [(1, 2)])], name, name),
                bar_chart(name, [Bar(name, 1.0, name)], name),
                coloured_text("k", name, [ENTROPY], [word]),
            )
        )
        return found

    plain = made("plain")
    for name in NAMES:
        assert (made(name).tags, made(name).attributes) == (plain.tags, plain.attributes)
    shown = page("".join(STEERING), paragraph("".join(STEERING)))
    assert not any(mark in shown for mark in STEERING)


MARKUP = [
    *NAMES,
    "[x](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example/x",
    "www.evil.example",
    "me@evil.example",
    "<https://evil.example>",
    "# heading",
    "- list",
    "1. list",
    "2) list",
    "* * *",
    "---",
    "===",
    "> quote",
    "`code`",
    "a | b",
    "&lt;b&gt; &#60;",
    "$x$ ~~y~~ __z__",
    "x\n\n# heading\n\n---\nlicense: mit\n---",
    "\\",
]


@pytest.mark.parametrize("name", MARKUP)
def test_names_are_no_markup_in_a_card(name: str) -> None:
    """As CommonMark with tables and bare links reads it."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    wanted = markdown.line(name)
    for around in ("{}", "# {}", "The teacher {} did it."):
        tokens = parser.parse(around.format(markdown.text(name)))
        assert [token.type for token in tokens if token.level == 0 and token.nesting == 1] == (
            ["heading_open"] if around.startswith("#") else ["paragraph_open"]
        )
        inline = next(token for token in tokens if token.type == "inline")
        assert {child.type for child in inline.children or []} <= {"text", "text_special", "code_inline"}
        read = "".join(child.content for child in inline.children or [])
        assert read == around.removeprefix("# ").format(wanted)
    row = parser.parse(markdown.table(("a", "b"), [(name, "c")]))
    cells = [token for token in row if token.type == "td_open"]
    assert len(cells) == 2


@pytest.mark.parametrize(
    "name", ["https://evil.example/|x", "www.evil.example", "a me@evil.example b", "@me"]
)
def test_bare_addresses_do_not_become_links(name: str) -> None:
    """GitHub and the hub make links and mentions of text, also of escaped text, but not of code."""
    parser = MarkdownIt("commonmark").enable("table")
    for tokens in (parser.parse(markdown.text(name)), parser.parse(markdown.table(("a",), [(name,)]))):
        inline = [child for token in tokens for child in token.children or []]
        text = "".join(child.content for child in inline if child.type != "code_inline")
        assert "evil" not in text and "@" not in text


def test_a_code_block_ends_where_it_should() -> None:
    text = markdown.command(["prog", "``` \n```` x\x1b[2J", "--hub-token", "hunter22"])
    tokens = MarkdownIt("commonmark").parse(text)
    assert [token.type for token in tokens] == ["fence"]
    assert "hunter22" not in text and "\x1b" not in text


BOMBS = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else '*a'] * 10)}]\n" for i in range(9)),
    "itself": "a: &a [*a]",
    "deep": "[" * 5_000,
    "deep maps": "".join(f"{' ' * i}a:\n" for i in range(300)),
    "long": "- a\n" * (MAX_NODES + 1),
    "large": "a" * (2**20 + 1),
    "digits": "seed: " + "9" * 5000,
    "day": "since: 2024-13-45",
    "code": "!!python/object/apply:os.system [ls]",
    "twice": "a: 1\na: 2",
    "unhashable": "? [1]\n: 2",
    "merge": "a: &a {x: 1}\nb: {<<: [*a, *a]}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_yaml_that_is_not_of_a_person(kind: str, tmp_path: Path) -> None:
    """Refused in one line before anything is built; the command lines end with 2 of a UserError."""
    file = tmp_path / "recipe.yaml"
    file.write_text(BOMBS[kind])
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        read_yaml(str(file), "--recipe x", "a YAML file")
    assert str(caught.value).startswith("--recipe x") and "\n" not in str(caught.value)
    # Walking what the aliases stand for would take years; this is no measurement.
    assert time.process_time() - began < 60


def test_yaml_of_people_stays() -> None:
    text = "base: &b {lr: 0.1, on: yes}\nstages: [{a: *b}, {c: *b}]\nn: null\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    assert len(parse_yaml("- a\n" * 100, nodes=101)) == 100
    with pytest.raises(ValueError, match="more than 100"):
        parse_yaml("- a\n" * 100, nodes=100)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[" * 100_000, "harm"),
        (b'{"a":' * 8_000 + b"1" + b"}" * 8_000, "deep"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "deep"),
        (b"[" + b"[]," * 10**6 + b"[]]", "harm"),
        (b"\xff", "decode"),
        (b"{", "line 1"),
        (b"9" * 5000, "digits"),
    ],
)
def test_json_that_is_not_of_a_writer(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(data)


def test_json_files_are_bounded_and_pipes_do_not_wait(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [[1]] * 500}).encode())
    assert read_json(file) == {"a": [[1]] * 500}
    with pytest.raises(ValueError, match="9 are possible"):
        read_json(file, 9)
    with file.open("wb") as opened:
        opened.truncate(MAX_JSON + 1)  # takes no place on the disk
    with pytest.raises(ValueError, match="possible"):
        read_json(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="regular"):
        read_json(file)
