"""`eval --text`: files of all kinds, against sums over whole logits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from student.evaluation.texts import TextSource, cut, measure, prefix_token, windows
from tests import teachers
from tests.teachers import text_of, word_tokenizer

Refused = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "student"))


@torch.no_grad()
def nats_of(model: Path, documents: list[str], length: int) -> tuple[float, int]:
    """Sum of -log p over all tokens, each predicted by itself from the window's tokens before it; their
    number.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False).input_ids
        for index, token in enumerate(ids):
            # A window predicts `length` tokens and reads the one before; the last one reads as many as that.
            end = min(index - index % length + length, len(ids))
            start = max(end - length, 0)
            context = [tokenizer.bos_token_id if start == 0 else ids[start - 1], *ids[start:index]]
            logits = network(torch.tensor([context])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
        count += len(ids)
    return total, count


def test_texts_of_student_and_teacher(distily: Run, student: Path, tmp_path: Path) -> None:
    documents = [text_of(20, 1), text_of(9, 2)]
    (tmp_path / "plain.txt").write_text(documents[0])
    rows = [{"body": one, "day": f"2024-0{i + 1}-05"} for i, one in enumerate(documents)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"body": [documents[1], None, " "]}), tmp_path / "rows.parquet")
    big = teachers.llama(tmp_path / "big", layers=2, seed=3)
    flags = ("--max-seq-len", 8, "--teacher", big, "--teacher-dtype", "float32", "--json")
    code, out, err = distily("eval", student, "--text", tmp_path / "plain.txt", *flags)
    assert code == 0, err
    (plain,) = json.loads(out)["texts"]
    size = len(documents[0].encode())
    for side, model in (("student", student), ("teacher", big)):
        nats, count = nats_of(model, documents[:1], 8)
        assert plain[side]["ce"] == pytest.approx(nats / count, rel=1e-5)
        assert plain[side]["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert plain[side]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (plain["samples"], plain["tokens"], plain["bytes"], plain["window"]) == (1, 20, size, 8)
    files = ("--text", tmp_path / "rows.jsonl", "--text", tmp_path / "rows.parquet", "--text-column", "body")
    code, out, err = distily("eval", student, *files, "--max-seq-len", 8, "--json")
    assert code == 0, err
    record = json.loads(out)
    first, second, third = record["texts"]  # the first is kept from before
    assert (first["name"], second["samples"], third["samples"]) == (str(tmp_path / "plain.txt"), 2, 1)
    nats, count = nats_of(student, documents, 8)
    assert second["student"]["ce"] == pytest.approx(nats / count, rel=1e-5)
    assert (second["teacher"], third["tokens"], record["teacher"]) == (None, 9, str(big))
    late = list(
        TextSource(
            name="x",
            source=str(tmp_path / "rows.jsonl"),
            column="body",
            since="2024-02-01",
            date_column="day",
        ).documents()
    )
    assert late == documents[1:]


def test_a_limit_ends_after_whole_windows_for_both_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text_of(50, 1))
    source, tokenizer = TextSource(name="a", source=str(tmp_path / "a.txt")), word_tokenizer(199)
    (piece,) = cut(source, tokenizer, 8, 3)
    assert len(tokenizer(piece).input_ids) == 3 * 8
    assert text_of(50, 1).startswith(piece)
    assert list(cut(source, tokenizer, 8, None)) == [text_of(50, 1)]
    assert prefix_token(tokenizer) == 1
    assert len(list(windows(range(50), 0, 8))) == 7


@given(count=st.integers(0, 200), length=st.integers(1, 40))
def test_windows_are_those_of_the_harness(count: int, length: int) -> None:
    tokens = list(range(100, 100 + count))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 7, length, 1))
    assert list(windows(tokens, 7, length)) == list(theirs)


def test_the_sum_is_that_of_the_harness(tmp_path: Path) -> None:
    """Of its own model class, also with a tokenizer that puts BOS in front of texts, whose BOS the harness
    predicts as well unless it is told not to add it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        teachers.llama(tmp_path / "m", layers=1, seed=3), dtype=torch.float32
    ).eval()
    document = text_of(45, 1)
    for puts_bos in (False, True):
        tokenizer = word_tokenizer(199)
        if puts_bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 1)]
            )
            assert tokenizer("the").input_ids[0] == 1
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=16, add_bos_token=False
        )
        request = Instance("loglikelihood_rolling", {}, (document,), 0)
        (wanted,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
        found = measure(model, tokenizer, [document], 16)
        assert found["tokens"] == 45
        assert -found["ce"] * found["tokens"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json", "csv", "tsv.gz", "parquet", "jsonl.zst", "arrow"])
@pytest.mark.parametrize("name", ["rows[1]", "a*b?", "two\nlines", "a::b"])
def test_kinds_of_files_at_any_path(tmp_path: Path, suffix: str, name: str) -> None:
    texts, file = ["the teacher", "NA", "of a\nstudent"], tmp_path / f"{name}.{suffix}"
    (tmp_path / f"rows1.{suffix}").write_bytes(b"neighbour")
    table = pa.table({"text": texts})
    kind, _, packing = suffix.partition(".")
    content = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts], indent=1),
        "csv": 'text\nthe teacher\nNA\n"of a\nstudent"\n',
        "tsv": 'text\tn\nthe teacher\t1\nNA\t2\n"of a\nstudent"\t3\n',
    }.get(kind, "")
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "arrow":
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif packing:
        codec = "gzip" if packing == "gz" else "zstd"
        with pa.CompressedOutputStream(str(file), codec) as stream:
            stream.write(content.encode())
    else:
        file.write_text(content)
    assert list(TextSource(name="x", source=str(file)).documents()) == texts


def test_a_split_of_files_alone_is_refused(refused: Refused, student: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "the teacher"}')
    line = refused("eval", student, "--text", tmp_path / "rows.jsonl", "--split", "test")
    assert "--split test: no data set of the hub" in line


def test_bad_requests(refused: Refused, student: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"words": "the teacher"}')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    for arguments, words in (
        (["--text", tmp_path / "rows.jsonl"], ["--text-column", "words"]),
        (
            ["--text", tmp_path / "rows.jsonl", "--text-column", "words", "--since", "2024-01-01"],
            ["--date-column"],
        ),
        (["--text", tmp_path / "empty.txt"], ["no text"]),
        (["--text", tmp_path / "image.png"], [".jsonl"]),
        (["--text", tmp_path / "latin.txt"], ["UTF-8"]),
        (["--text", "./missing.txt"], ["no such file"]),
        (["--text", "nobody/nothing"], ["nobody/nothing"]),
        (["--text", tmp_path / "rows.jsonl", "--since", "today"], ["--since"]),
        (["--text", tmp_path / "latin.txt", "--max-seq-len", 2], ["--max-seq-len"]),
        (["--text", tmp_path / "rows.jsonl", "--text-column", "words", "--max-seq-len", 4000], ["256"]),
        (["--text", tmp_path / "rows.jsonl", "--teacher", tmp_path], ["--teacher"]),
        (["--text", tmp_path / "rows.jsonl", "--teacher-dtype", "int4"], ["--teacher-dtype"]),
    ):
        line = refused("eval", student, *arguments)
        assert all(word in line for word in words), line
    assert not (student / "eval.json").exists()
