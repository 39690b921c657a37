"""Cutting, packing, leaving out: every token once, in order, with its mask; nothing is too long."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.samples import MIN_TOKENS, LeftOut, cut, make_samples, packed
from pipeline.tokens import Tokenised

EOS = 2
# A document: each token with whether it is learned.
document = st.lists(st.tuples(st.integers(2, 99), st.booleans()), max_size=40)
documents = st.lists(document, max_size=8)


def tokenised(pairs: Iterable[tuple[int, bool]]) -> Tokenised:
    values = list(pairs)
    return np.array([t for t, _ in values], np.int32), np.array([m for _, m in values], np.bool_)


def learned(*tokens: int) -> Tokenised:
    return tokenised([(token, True) for token in tokens])


def pairs_of(one: Tokenised) -> list[tuple[int, bool]]:
    return list(zip(one[0].tolist(), one[1].tolist(), strict=True))


@given(pairs=document, size=st.integers(2, 20))
def test_cut_covers_everything(pairs: list[tuple[int, bool]], size: int) -> None:
    windows = [pairs_of(window) for window in cut([tokenised(pairs)], size)]
    assert [pair for window in windows for pair in window] == pairs
    assert all(len(window) == size for window in windows[:-1]) and len(windows[-1]) <= size


@given(given_documents=documents, size=st.integers(2, 20), mark=st.booleans())
def test_packing_joins_documents(
    given_documents: list[list[tuple[int, bool]]], size: int, mark: bool
) -> None:
    stream: list[tuple[int, bool]] = []
    for pairs in filter(None, given_documents):
        if stream and EOS not in (stream[-1][0], pairs[0][0]):
            stream.append((EOS, mark))
        stream += pairs
    windows = [pairs_of(w) for w in packed(map(tokenised, given_documents), EOS, mark, size)]
    assert windows == [stream[start : start + size] for start in range(0, len(stream), size)]


@given(
    given_documents=documents,
    size=st.integers(2, 20),
    least=st.integers(2, 20),
    pack=st.booleans(),
    drop=st.booleans(),
)
def test_what_is_no_sample_is_counted(
    given_documents: list[list[tuple[int, bool]]], size: int, least: int, pack: bool, drop: bool
) -> None:
    kept = [pairs for pairs in given_documents if not (drop and len(pairs) > size)]
    source = list(map(tokenised, kept))
    windows = [pairs_of(w) for w in (packed(source, EOS, False, size) if pack else cut(source, size))]
    expected: list[list[tuple[int, bool]]] = []
    counts = LeftOut(too_long=len(given_documents) - len(kept))
    for window in windows:
        if len(window) < least:
            counts.too_short += 1
        elif not any(mask for _, mask in window[1:]):
            counts.nothing_learned += 1
        elif window in expected:
            counts.duplicates += 1
        else:
            expected.append(window)
    options = {"max_seq_len": size, "vocab_size": 100, "min_seq_len": least, "drop_long": drop}
    joiner = (EOS, False) if pack else None
    if not expected:
        with pytest.raises(RequestError, match="DATASET: empty"):
            make_samples(map(tokenised, given_documents), **options, joiner=joiner)  # type: ignore[arg-type]
        return
    samples, left_out = make_samples(map(tokenised, given_documents), **options, joiner=joiner)  # type: ignore[arg-type]
    assert [pairs_of((sample.tokens, sample.loss_mask)) for sample in samples] == expected
    assert left_out == counts


def test_documents_do_not_mix_without_packing_and_duplicates_collapse() -> None:
    source = [learned(3, 4, 5), learned(3, 4, 5), learned(6, 7)]
    samples, left_out = make_samples(source, max_seq_len=2, vocab_size=100)
    assert [sample.tokens.tolist() for sample in samples] == [[3, 4], [6, 7]]
    assert left_out == LeftOut(too_short=2, duplicates=1)
    assert str(left_out) == "2 too short, 1 duplicates"
    assert str(LeftOut()) == ""


def test_the_same_tokens_with_another_mask_are_another_sample() -> None:
    source = [tokenised([(3, False), (4, True)]), learned(3, 4)]
    assert len(make_samples(source, max_seq_len=2, vocab_size=100)[0]) == 2


def test_a_first_token_is_not_learned_from_anything() -> None:
    """A window whose only learned token comes first, where no token is left of it, is no sample."""
    source = [tokenised([(3, False), (4, False), (5, True), (6, False)]), learned(7, 8)]
    samples, left_out = make_samples(source, max_seq_len=2, vocab_size=100)
    assert [sample.tokens.tolist() for sample in samples] == [[7, 8]]
    assert left_out == LeftOut(nothing_learned=2)


def test_num_samples_stops_reading() -> None:
    def endless():  # type: ignore[no-untyped-def]
        number = 3
        while True:
            number += 1
            yield learned(number % 90 + 3, number % 50 + 3, number % 33 + 3)

    assert len(make_samples(endless(), max_seq_len=8, vocab_size=100, num_samples=70)[0]) == 70
    pack = make_samples(endless(), max_seq_len=8, vocab_size=100, num_samples=70, joiner=(EOS, True))
    assert len(pack[0]) == 70


@pytest.mark.parametrize("source", [[], [learned()], [learned(7)]])
def test_no_text_is_refused(source: list[Tokenised]) -> None:
    with pytest.raises(RequestError, match=f"empty, no sample of at least {MIN_TOKENS} tokens"):
        make_samples(source, max_seq_len=8, vocab_size=100)


def test_tokens_outside_the_teachers_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="vocabulary ends at 9"):
        make_samples([learned(3, 10)], max_seq_len=8, vocab_size=10)
