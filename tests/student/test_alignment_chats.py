"""Special tokens and turns of chats in the tokens of a student with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import AutoTokenizer

from student.alignment import Retokeniser, match_specials, read_vocabulary, shared_ids
from student.errors import UserError
from tests import teachers
from tests.student.vocabularies import byte_bpe, bytes_alone, fast, pieces_bpe, unigram, with_specials

# What opens a turn, ends it, and lies behind it.
FORMS = {
    "chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"),
    "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "gemma": ("<start_of_turn>{}\n", "<end_of_turn>", "\n"),
    "phi3": ("<|{}|>\n", "<|end|>", "\n"),
}
CHAT = [
    ("user", "hello the cache?"),
    ("assistant", "the student learns 12"),
    ("user", "and [INST] or <b>?"),
    ("assistant", "\n caf\u00e9 \U0001f600"),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """One for each form; those of ChatML and Llama 3 are configured as SmolLM2's and Llama 3's are."""
    llama3 = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    return {
        "chatml": with_specials(
            byte_bpe(), ["<|im_start|>", "<|im_end|>"], bos_token="<|im_start|>", eos_token="<|im_end|>"
        ),
        "llama3": with_specials(
            bytes_alone(), llama3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        ),
        "gemma": with_specials(pieces_bpe("never"), ["<start_of_turn>", "<end_of_turn>"]),
        "phi3": with_specials(unigram("never"), ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    }


def chat(tokenizer: Any, form: str) -> list[tuple[list[int], bool]]:
    """The ids of each part of the chat, and whether they are learned."""
    opening, end, gap = FORMS[form]
    parts = []
    for role, content in CHAT:
        name = "model" if form == "gemma" and role == "assistant" else role
        parts += [(opening.format(name), False), (content + end, role == "assistant"), (gap, False)]
    return [(tokenizer.encode(text, add_special_tokens=False), learned) for text, learned in parts]


@pytest.mark.parametrize(("teacher", "student"), [(a, b) for a in FORMS for b in FORMS if a != b])
def test_turns_are_written_as_the_students_template_does(
    tokenizers: dict[str, Any], teacher: str, student: str
) -> None:
    """What is learned stays so, and where a turn has been opened or ended, both are there."""
    theirs, own = chat(tokenizers[teacher], teacher), chat(tokenizers[student], student)
    retokenise = Retokeniser(tokenizers[teacher], tokenizers[student])
    found = retokenise(
        [index for ids, _ in theirs for index in ids], [learned for ids, learned in theirs for _ in ids]
    )
    prefix = list(retokenise.student.prefix)
    expected = [index for ids, _ in own for index in ids]
    expected = expected[
        : len(expected) - len(own[-1][0]) * (not FORMS[teacher][2])
    ]  # none ends the last turn
    assert found.ids_S.tolist() == prefix + expected
    mask = [False] * len(prefix) + [learned for ids, learned in own for _ in ids]
    assert found.loss_mask_S.tolist() == mask[: len(found.ids_S)]
    pairs = found.alignment.boundaries_A2.tolist()
    t, s = -1, len(prefix) - 1
    for part, ((ids, _), (own_ids, _)) in enumerate(zip(theirs, own, strict=True)):
        t, s = t + len(ids), s + len(own_ids)
        if part % 3 == 0:
            assert [t, s] in pairs
    assert found.counts.turns == len(CHAT)
    assert found.counts.specials_dropped == found.counts.undecodable_bytes == 0
    assert found.counts.specials_as_text == 0


def test_a_turn_that_begins_within_a_token(demo: Path, tokenizers: dict[str, Any]) -> None:
    teacher, student = AutoTokenizer.from_pretrained(demo / "teacher"), tokenizers["llama3"]
    ids = teacher.encode("<|im_start|>user\n\n\nhello<|im_end|>\n")
    assert teacher.convert_ids_to_tokens(ids)[:3] == ["<|im_start|>", "user", "ĊĊ"]
    found = Retokeniser(teacher, student)(ids, [True] * len(ids))
    assert student.decode(found.ids_S) == "<|start_header_id|>user<|end_header_id|>\n\n\n\nhello<|eot_id|>"


def test_special_tokens_go_by_text_and_role(tokenizers: dict[str, Any]) -> None:
    """ChatML's start of a turn is its BOS only in name, and its end of one ends texts as well."""
    names = {form: tokenizer.convert_ids_to_tokens for form, tokenizer in tokenizers.items()}

    def mapped(teacher: str, student: str) -> dict[str, str]:
        pair = (read_vocabulary(tokenizers[form]) for form in (teacher, student))
        return {names[teacher](t): names[student](s) for t, s in match_specials(*pair).items()}

    assert mapped("chatml", "llama3") == {
        "<|im_start|>": "<|start_header_id|>",
        "<|im_end|>": "<|eot_id|>",
        "<s>": "<|begin_of_text|>",
        "</s>": "<|end_of_text|>",
    }
    assert mapped("llama3", "chatml") == {
        "<|begin_of_text|>": "<s>",
        "<|end_of_text|>": "<|im_end|>",
        "<|start_header_id|>": "<|im_start|>",
        "<|eot_id|>": "<|im_end|>",
    }
    assert mapped("chatml", "phi3") == {"<|im_end|>": "<|end|>", "<s>": "<s>", "</s>": "</s>"}
    assert mapped("gemma", "phi3")["<unk>"] == "<unk>"


def test_special_tokens_without_a_counterpart(demo: Path) -> None:
    """Markers become text; BOS, EOS, padding and unknown text nothing. All are counted."""
    teacher, student = AutoTokenizer.from_pretrained(demo / "teacher"), bytes_alone()
    ids = teacher.encode("<|im_start|>user\nhi<|im_end|><|endoftext|>the<repo_name>x")
    found = Retokeniser(teacher, student)(ids, [True] * len(ids))
    assert student.decode(found.ids_S) == "<|im_start|>user\nhi<|im_end|>the<repo_name>x"
    assert (found.counts.specials_as_text, found.counts.specials_dropped) == (3, 1)
    assert found.alignment.boundaries_A2[0].tolist() == [0, len("<|im_start|>") - 1]
    end = ids.index(0)
    assert [end, len("<|im_start|>user\nhi<|im_end|>") - 1] in found.alignment.boundaries_A2.tolist()
    assert found.loss_mask_S.all()


def test_shared_ids_have_the_same_bytes_or_role(demo: Path, tokenizers: dict[str, Any]) -> None:
    teacher = read_vocabulary(AutoTokenizer.from_pretrained(demo / "teacher"))
    for student in map(read_vocabulary, tokenizers.values()):
        shared = shared_ids(teacher, student)
        specials = match_specials(teacher, student)
        for index, own in enumerate(shared.tolist()):
            if index in teacher.roles:
                assert own == specials.get(index, -1)
            elif own >= 0:
                assert teacher.texts[index] == student.texts[own] != b""
            else:
                assert not teacher.texts[index] or teacher.texts[index] not in student.texts
    gemma = read_vocabulary(tokenizers["gemma"])
    assert shared_ids(teacher, gemma)[teacher.texts.index(b"a")] != gemma.byte_ids[ord("a")]


def test_words_of_a_teacher(tokenizers: dict[str, Any]) -> None:
    """Its spaces are a guess."""
    teacher = teachers.word_tokenizer(199)
    ids = teacher.encode("the teacher learns, the student")
    found = Retokeniser(teacher, tokenizers["llama3"])(ids, [True] * len(ids))
    text = tokenizers["llama3"].decode(found.ids_S)
    assert text == "the teacher learns, the student"
    assert len(found.alignment.boundaries_A2) == len(ids)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"the tokenizer object has no tokenizer.json.*fast tokenizer"):
        read_vocabulary(object())
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(UserError, match=r"decoder \(BPEDecoder\) does not say which bytes"):
        read_vocabulary(fast(tokenizer))
    tokenizer.decoder = decoders.Replace(Regex("a+"), "b")
    with pytest.raises(UserError, match=r"decoder \(a pattern\) does not say"):
        read_vocabulary(fast(tokenizer))
