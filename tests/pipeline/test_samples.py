"""Cutting and packing: every token once and in order, nothing longer than asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.samples import MIN_TOKENS, cut, make_samples

EOS = 2


class Tokenizer:
    """Tokenises a text of numbers to those numbers; what `make_samples` needs of a tokenizer, no more."""

    eos_token_id: int | None = EOS

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


documents = st.lists(st.lists(st.integers(3, 99), max_size=40), min_size=1, max_size=8)


@given(tokens=st.lists(st.integers(0, 99), max_size=60), size=st.integers(2, 20))
def test_cut_covers_everything_but_a_rest_of_one(tokens: list[int], size: int) -> None:
    windows = list(cut(tokens, size))
    joined = [token for window in windows for token in window]
    assert all(MIN_TOKENS <= len(window) <= size for window in windows)
    assert joined == tokens[: len(joined)]
    assert len(tokens) - len(joined) < MIN_TOKENS
    assert all(len(window) == size for window in windows[:-1])


@given(texts=documents, size=st.integers(2, 20))
def test_packing_joins_documents_with_eos(texts: list[list[int]], size: int) -> None:
    stream: list[int] = []
    for index, text in enumerate(texts):
        stream += ([EOS] if index and text else []) + text
    expected = list(cut(stream, size))
    try:
        samples = make_samples(
            [" ".join(map(str, text)) for text in texts],
            Tokenizer(),
            max_seq_len=size,
            vocab_size=100,
            pack=True,
        )
    except RequestError:
        assert not expected
        return
    unique = list(dict.fromkeys(map(tuple, expected)))
    assert [tuple(sample.tokens.tolist()) for sample in samples] == unique
    assert all(sample.loss_mask.all() for sample in samples)


def test_documents_do_not_mix_without_packing_and_duplicates_collapse() -> None:
    samples = make_samples(["3 4 5", "3 4 5", "6 7"], Tokenizer(), max_seq_len=2, vocab_size=100)
    assert [sample.tokens.tolist() for sample in samples] == [[3, 4], [6, 7]]


def test_num_samples_stops_reading() -> None:
    def endless():  # type: ignore[no-untyped-def]
        number = 3
        while True:
            number += 1
            yield f"{number % 90 + 3} {number % 50 + 3} {number % 33 + 3}"

    assert len(make_samples(endless(), Tokenizer(), max_seq_len=8, vocab_size=100, num_samples=70)) == 70


@pytest.mark.parametrize("texts", [[], [""], ["7"]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(RequestError, match="empty"):
        make_samples(texts, Tokenizer(), max_seq_len=8, vocab_size=100)


def test_tokens_outside_the_teachers_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="vocabulary ends at 9"):
        make_samples(["3 10"], Tokenizer(), max_seq_len=8, vocab_size=10)


def test_packing_needs_an_end_of_sequence_token() -> None:
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(RequestError, match="--pack"):
        make_samples(["3 4"], tokenizer, max_seq_len=8, vocab_size=10, pack=True)
