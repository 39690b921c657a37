"""The ids of a cache are those of the checkpoint's own tokenizer file, and a store keeps all its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from featurestore.reader import CacheReader
from pipeline.data.tokens import tokenise_texts
from pipeline.report.token_text import load_pieces
from pipeline.teacher.checkpoint import load_teacher
from tests import teachers
from tests.command import cli, generate
from tests.tokenizers import TEXT, byte_level, file_ids, word_piece

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *teachers.WORDS]
# A tokenizer whose vocabulary lies in a file of no known name.
CODE = """
from pathlib import Path
from transformers import PythonBackend

class WordsTokenizer(PythonBackend):
    vocab_files_names = {"vocab_file": "words.lst"}

    def __init__(self, vocab_file=None, **kwargs):
        self._words = Path(vocab_file).read_text().split() if vocab_file else ["<unk>", "</s>"]
        super().__init__(unk_token="<unk>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self._words)

    def get_vocab(self):
        return {word: index for index, word in enumerate(self._words)}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return self._words[index]
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teachers.llama(tmp_path / "teacher", vocab_size=330)


@pytest.mark.parametrize(
    ("label", "config"),
    [
        ("LlamaTokenizerFast", {}),
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": False, "legacy": True}),
        ("Qwen2Tokenizer", {}),
        ("GPT2TokenizerFast", {"add_prefix_space": True}),
        (None, {}),
    ],
)
def test_captured_ids_are_those_of_the_tokenizer_file(
    teacher: Path, text: Path, tmp_path: Path, label: str | None, config: dict[str, bool]
) -> None:
    byte_level(teacher, label, **config)
    generate(teacher, text, tmp_path / "store", "--top-k", 4, "--max-seq-len", 200)
    reader = CacheReader.open(tmp_path / "store")
    assert reader.read(0).tokens.tolist() == file_ids(teacher, TEXT)
    # Token texts of `info --sample` are the tokenizer's as well.
    pieces = load_pieces(reader.teacher_dir)
    assert pieces is not None
    assert (
        "".join(map(pieces, reader.read(0).tokens[1:].tolist()))
        .encode(errors="ignore")
        .startswith(b"the teacher  learns 12")
    )


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with a rule of its own in Python, which a backend knows nothing of."""

    def _encode_plus(self, text: Any, *more: Any, **options: Any) -> Any:
        return super()._encode_plus([one.upper() for one in text], *more, **options)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Shouting])
@pytest.mark.parametrize("cut", [False, True])
def test_texts_are_tokenised_as_transformers_does(
    teacher: Path, kind: type[PreTrainedTokenizerFast], cut: bool
) -> None:
    """Also by a tokenizer that was asked to cut and to pad before."""
    tokenizer = kind.from_pretrained(byte_level(teacher), pad_token="</s>")
    texts = [
        TEXT,
        "",
        "a",
        " \n\n  ",
        "na\u00efve e\u0301 \U0001f469\u200d\U0001f680 <s>1234</s>",
        TEXT.upper(),
    ]
    wanted = tokenizer(texts)["input_ids"]
    if cut:
        tokenizer(texts, truncation=True, max_length=3, padding="max_length")
    found = [one.tokens.tolist() for one in tokenise_texts(texts, tokenizer)]
    assert found == [ids if len(ids) > 1 else [] for ids in wanted]


def test_a_broken_tokenizer_file_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    byte_level(teacher)
    (teacher / "tokenizer.json").write_text('{"model": {}}')
    code, _, err = cli("plan", teacher, text, "--out", tmp_path / "s", "--engine", "transformers")
    assert code == 2 and "its tokenizer does not load" in err and err.count("\n") == 1


def test_two_vocabularies_are_two_teachers(teacher: Path, text: Path, tmp_path: Path) -> None:
    text.write_text("the teacher learns and the student learns")
    first, second = teacher, tmp_path / "second"
    shutil.copytree(first, second)
    word_piece(first, WORDS)
    word_piece(second, [*WORDS[:5], *reversed(WORDS[5:])])
    store = tmp_path / "store"
    generate(first, text, store, "--top-k", 4)
    code, _, err = cli("generate", second, text, "--out", store, "--engine", "transformers", "--top-k", 4)
    assert code == 2 and "tokenizer_digest" in err
    reader = CacheReader.open(store)
    kept = AutoTokenizer.from_pretrained(reader.teacher_dir)
    assert kept.get_vocab() == AutoTokenizer.from_pretrained(first).get_vocab()
    assert kept.decode(reader.read(0).tokens, skip_special_tokens=True).startswith("the teacher learns")


def test_identities_of_before_stay(teacher: Path) -> None:
    """Stores of a teacher with a tokenizer.json are found by the digest that they were made with."""
    byte_level(teacher)
    (teacher / "spiece.model").write_bytes(b"beside it")
    (teacher / "vocab.txt").write_bytes(b"beside it")
    expected = blake3()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (teacher / name).read_bytes()
        expected.update(blake3(name.encode()).digest() + blake3(data).digest())
    assert load_teacher(str(teacher)).tokenizer_digest == expected.hexdigest()


def test_a_tokenizer_of_files_that_are_not_kept_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    (teacher / "tokenization_words.py").write_text(CODE)
    (teacher / "words.lst").write_text("<unk> </s> the teacher learns")
    (teacher / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "WordsTokenizer", '
        '"auto_map": {"AutoTokenizer": ["tokenization_words.WordsTokenizer", null]}}'
    )
    flags = ("--engine", "transformers", "--trust-remote-code", "--top-k", 4)
    request = (teacher, text, "--out", tmp_path / "s", *flags)
    code, _, err = cli("plan", *request)
    assert code == 2 and "reads files that a cache does not keep" in err and err.count("\n") == 1
    # Under a name that is kept the same tokenizer is taken.
    (teacher / "words.lst").rename(teacher / "vocab.txt")
    (teacher / "tokenization_words.py").write_text(CODE.replace("words.lst", "vocab.txt"))
    code, _, err = cli("plan", *request)
    assert code == 0, err


def test_named_chat_templates_are_kept(teacher: Path, text: Path, tmp_path: Path) -> None:
    byte_level(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(teacher)
    generate(teacher, text, tmp_path / "store", "--top-k", 4)
    kept = CacheReader.open(tmp_path / "store").teacher_dir
    assert (kept / "chat_template.jinja").is_file()
    assert (kept / "additional_chat_templates.tool_use.jinja").read_text() == "{{ tools }}"
