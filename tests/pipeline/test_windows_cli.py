"""Documents as samples, end to end: how windows begin, how texts end, and what is no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from featurestore.reader import CachedSample, CacheReader
from tests import teachers
from tests.command import cli, generate
from tests.tokenizers import byte_level, file_ids

BOS, EOS = 0, 1


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A tokenizer that puts BOS in front of a text, as Gemma's and Llama's do."""
    return byte_level(teachers.llama(tmp_path / "teacher", vocab_size=330))


def write(path: Path, rows: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


def samples(store: Path) -> list[CachedSample]:
    reader = CacheReader.open(store)
    return [reader.read(index) for index in range(len(reader))]


TEXTS = [teachers.text_of(60, 1) + "  12 34", "a student of the cache, na\u00efve", "the cache"]


@pytest.mark.parametrize("length", [9, 32])
def test_every_window_of_a_text_begins_with_bos(teacher: Path, tmp_path: Path, length: int) -> None:
    data = write(tmp_path / "d.jsonl", TEXTS)
    generate(teacher, data, tmp_path / "s", "--top-k", 4, "--max-seq-len", length)
    found = samples(tmp_path / "s")
    assert {int(sample.tokens[0]) for sample in found} == {BOS}
    assert not any((sample.tokens[1:] == BOS).any() for sample in found)
    assert max(len(sample.tokens) for sample in found) == length
    assert all(sample.loss_mask[1:].all() for sample in found)
    # The first windows are those that there have always been, and the others hold the rest of each text.
    kept = [sample.tokens[1:].tolist() for sample in found]
    for text in TEXTS:
        ids = file_ids(teacher, text)[1:]
        windows = [ids[start : start + length - 1] for start in range(0, len(ids), length - 1)]
        assert all(window in kept for window in windows if len(window) > 1)
    first = [sample for sample in found if sample.tokens.tolist() == file_ids(teacher, TEXTS[0])[:length]]
    assert [bool(sample.loss_mask.all()) for sample in first] == [True]


def test_every_packed_window_begins_with_bos(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", TEXTS)
    generate(teacher, data, tmp_path / "s", "--top-k", 4, "--max-seq-len", 16, "--pack")
    found = samples(tmp_path / "s")
    assert len(found) > 3 and {int(sample.tokens[0]) for sample in found} == {BOS}
    learned = [t for s in found for t, m in zip(s.tokens[1:].tolist(), s.loss_mask[1:], strict=True) if m]
    body = [id for id in learned if id != EOS]
    assert body == [id for text in TEXTS for id in file_ids(teacher, text)[1:]]


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_windows_of_a_chat_begin_with_bos_too(teacher: Path, tmp_path: Path, loss: str) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    turn = [{"role": "user", "content": "the cache"}, {"role": "assistant", "content": "a student  learns."}]
    data = write(tmp_path / "c.jsonl", [turn * 6], "messages")
    flags = ("--chat-template", template, "--loss-on", loss)
    generate(teacher, data, tmp_path / "s", "--top-k", 4, "--max-seq-len", 24, *flags)
    found = samples(tmp_path / "s")
    assert len(found) > 2 and {int(sample.tokens[0]) for sample in found} == {BOS}
    assert not any((sample.tokens[1:] == BOS).any() for sample in found)
    # A template that writes none has none in any window.
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    generate(teacher, data, tmp_path / "none", "--top-k", 4, "--max-seq-len", 24, *flags)
    assert not any((sample.tokens == BOS).any() for sample in samples(tmp_path / "none"))


def test_what_a_tokenizer_puts_behind_a_text_stands_at_its_end_only(teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    tokenizer.save_pretrained(teacher)
    data = write(tmp_path / "d.jsonl", TEXTS[:1])
    generate(teacher, data, tmp_path / "s", "--top-k", 4, "--max-seq-len", 16)
    ends = sorted((sample.tokens == EOS).sum() for sample in samples(tmp_path / "s"))
    assert ends[:-1] == [0] * (len(ends) - 1) and ends[-1] == 1 and len(ends) > 3
    # Where something is written on a text, it has not ended.
    flags = ("--continuations", 1, "--prompt-tokens", 40, "--continuation-max-tokens", 8)
    data = write(tmp_path / "p.jsonl", TEXTS[2:])
    generate(teacher, data, tmp_path / "w", "--top-k", 4, *flags)
    (written,) = samples(tmp_path / "w")
    prompt = file_ids(teacher, TEXTS[2])[:-1]
    assert written.tokens[: len(prompt)].tolist() == prompt
    assert written.loss_mask.tolist() == [at >= len(prompt) for at in range(len(written.tokens))]


@pytest.mark.parametrize("pack", ["--pack", "--no-pack"])
def test_append_eos_ends_each_text_once(teacher: Path, tmp_path: Path, pack: str) -> None:
    data = write(tmp_path / "d.jsonl", [TEXTS[0], TEXTS[1] + "</s>"])
    flags = ("--top-k", 4, "--max-seq-len", 16, pack)
    generate(teacher, data, tmp_path / "with", *flags, "--append-eos")
    generate(teacher, data, tmp_path / "without", *flags)
    counts = {}
    for name in ("with", "without"):
        found = samples(tmp_path / name)
        ends = [(s, at) for s in found for at, id in enumerate(s.tokens.tolist()) if id == EOS]
        assert all(s.loss_mask[at] and (pack == "--pack" or at == len(s.tokens) - 1) for s, at in ends)
        counts[name] = len(ends)
    assert counts == {"with": 2, "without": 2 if pack == "--pack" else 1}


def test_append_eos_where_it_means_nothing_is_refused(teacher: Path, tmp_path: Path) -> None:
    chats = write(tmp_path / "c.jsonl", [[{"role": "user", "content": "a"}]], "messages")
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    base = ("--out", tmp_path / "s", "--engine", "transformers", "--append-eos")
    code, _, err = cli("plan", teacher, chats, *base, "--chat-template", template)
    assert code == 2 and "--append-eos: a chat ends as its chat template writes it" in err
    texts = write(tmp_path / "d.jsonl", TEXTS)
    code, _, err = cli("plan", teacher, texts, *base, "--continuations", 1)
    assert code == 2 and "--append-eos: not with --continuations" in err


def test_a_byte_order_mark_is_no_text(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfthe teacher learns")
    generate(teacher, folder, tmp_path / "s", "--top-k", 4)
    assert [s.tokens.tolist() for s in samples(tmp_path / "s")] == [file_ids(teacher, "the teacher learns")]


@pytest.mark.parametrize("pack", ["--pack", "--no-pack"])
def test_empty_documents_are_left_out_and_counted(teacher: Path, tmp_path: Path, pack: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (folder / "c.txt").write_text("the teacher learns")
    made = generate(teacher, folder, tmp_path / "s", "--top-k", 4, pack)
    assert made["left_out"]["empty"] == 2 and made["samples"] == 1
    rows = write(tmp_path / "d.jsonl", ["", "a student of the cache", ""])
    made = generate(teacher, rows, tmp_path / "s", "--top-k", 4, pack)
    assert made["left_out"]["empty"] == 2 and made["samples"] == 1


def test_nothing_but_empty_texts_is_refused(teacher: Path, tmp_path: Path) -> None:
    base = ("--out", tmp_path / "s", "--engine", "transformers", "--top-k", 4)
    (tmp_path / "e.txt").write_text("")
    for data in (tmp_path / "e.txt", write(tmp_path / "d.jsonl", [""])):
        code, _, err = cli("plan", teacher, data, *base)
        assert code == 2 and "(1 empty)" in err.splitlines()[-1]
    (tmp_path / "n.jsonl").write_text("")
    code, _, err = cli("plan", teacher, tmp_path / "n.jsonl", *base)
    assert code == 2 and "Traceback" not in err
