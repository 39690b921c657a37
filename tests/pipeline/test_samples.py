"""Cutting, packing, leaving out: every token once, in order, with its mask; nothing is too long."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.format.schema import Sample
from pipeline.data.samples import MIN_TOKENS, LeftOut, Window, cut, make_samples, no_sample, packed
from pipeline.data.tokens import Tokenised
from pipeline.errors import RequestError

EOS = 2
# A document: each token with whether it is learned.
document = st.lists(st.tuples(st.integers(2, 99), st.booleans()), max_size=40)
documents = st.lists(document, max_size=8)


def tokenised(pairs: Iterable[tuple[int, bool]]) -> Tokenised:
    values = list(pairs)
    return Tokenised(
        tokens=np.array([t for t, _ in values], np.int32), learned=np.array([m for _, m in values], np.bool_)
    )


def learned(*tokens: int) -> Tokenised:
    return tokenised([(token, True) for token in tokens])


def pairs_of(one: Window | Sample) -> list[tuple[int, bool]]:
    learned = one.loss_mask if isinstance(one, Sample) else one.learned
    return list(zip(one.tokens.tolist(), learned.tolist(), strict=True))


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
    kept = [pairs for pairs in given_documents if pairs and not (drop and len(pairs) > size)]
    source = list(map(tokenised, kept))
    windows = [pairs_of(w) for w in (packed(source, EOS, False, size) if pack else cut(source, size))]
    expected: list[list[tuple[int, bool]]] = []
    empty = given_documents.count([])
    counts = LeftOut(empty=empty, too_long=len(given_documents) - len(kept) - empty)
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
    samples, left_out = make_samples(map(tokenised, given_documents), **options, joiner=joiner)  # type: ignore[arg-type]
    assert [pairs_of(sample) for sample in samples] == expected
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


def test_no_text_makes_no_sample() -> None:
    for source in ([], [learned()], [learned(7)]):
        samples, left_out = make_samples(source, max_seq_len=8, vocab_size=100)
        assert not samples
        assert f"empty, no sample of at least {MIN_TOKENS} tokens" in str(no_sample(MIN_TOKENS, left_out))


def test_known_samples_are_duplicates() -> None:
    first, second = [learned(3, 4)], [learned(5, 6), learned(3, 4)]
    known = {sample.id for sample in make_samples(first, max_seq_len=2, vocab_size=100)[0]}
    samples, left_out = make_samples(second, max_seq_len=2, vocab_size=100, known=known)
    assert [sample.tokens.tolist() for sample in samples] == [[5, 6]] and left_out == LeftOut(duplicates=1)


def test_tokens_outside_the_teachers_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="vocabulary ends at 9"):
        make_samples([learned(3, 10)], max_seq_len=8, vocab_size=10)


# Tokenizers that put something in front of a text (F7 of the shared list: BOS in front of every window).
BOS, SOP = 90, 91


def begun(prefix: list[int], tokens: list[int], key: str = "") -> Tokenised:
    """As `tokenise_texts` gives it."""
    mask = np.ones(len(prefix) + len(tokens), np.bool_)
    mask[1 : len(prefix)] = False
    ids = np.array([*prefix, *tokens], np.int32)
    return Tokenised(tokens=ids, learned=mask, prefix=len(prefix), key=key)


bodies = st.lists(st.lists(st.integers(3, 80), min_size=1, max_size=30), min_size=1, max_size=8)
prefixes = st.sampled_from([[BOS], [BOS, SOP], [EOS]])


@given(texts=bodies, prefix=prefixes, size=st.integers(4, 20))
def test_every_window_begins_as_a_text_does(texts: list[list[int]], prefix: list[int], size: int) -> None:
    for text in texts:
        windows = [pairs_of(window) for window in cut([begun(prefix, text)], size)]
        assert all([token for token, _ in window[: len(prefix)]] == prefix for window in windows)
        body = [pair for window in windows for pair in window[len(prefix) :]]
        assert body == [(token, True) for token in text]
        assert all(len(window) == size for window in windows[:-1]) and len(windows[-1]) <= size
        # Position 0 has nothing to be learned from; what follows it in the prefix is not learned.
        assert not any(mask for window in windows for _, mask in window[1 : len(prefix)])
        assert not any(window[0][1] for window in windows[1:])
        # The first window is the text's own beginning, whose id it has always had.
        assert windows[0][0] == (prefix[0], True)


@given(texts=bodies, prefix=prefixes, size=st.integers(4, 20))
def test_every_packed_window_begins_as_a_text_does(
    texts: list[list[int]], prefix: list[int], size: int
) -> None:
    source = [begun(prefix, text, f"{number:016x}") for number, text in enumerate(texts)]
    windows = list(packed(source, EOS, True, size))
    rows = [pairs_of(window) for window in windows]
    assert all([token for token, _ in row[: len(prefix)]] == prefix for row in rows)
    assert all(len(row) == size for row in rows[:-1]) and len(rows[-1]) <= size
    # Every token of every text once, in order and learned; of what is put in front only a joiner is learned.
    marks = {*prefix, EOS}
    whole = [pair for row in rows for pair in row if pair[0] not in marks]
    assert whole == [(token, True) for text in texts for token in text]
    learned_marks = [token for row in rows for token, mask in row[1:] if token in marks and mask]
    assert set(learned_marks) <= {EOS} and len(learned_marks) < len(texts)
    # A document is named by exactly the windows that hold a part of it.
    for number, text in enumerate(texts):
        held = [window for window in windows if f"{number:016x}" in window.documents]
        assert sum(len(window.tokens) for window in held) >= len(text)
    order = [int(key, 16) for window in windows for key in window.documents]
    assert order == sorted(order) and set(order) == set(range(len(texts)))


def test_packed_windows_with_bos() -> None:
    source = [begun([BOS], [3, 4, 5], "a"), begun([BOS], [6, 7, 8, 9], "b"), begun([BOS], [10, 11], "c")]
    windows = list(packed(source, EOS, True, 6))
    assert [window.tokens.tolist() for window in windows] == [
        [BOS, 3, 4, 5, EOS, BOS],
        [BOS, 6, 7, 8, 9, EOS],
        [BOS, 10, 11],
    ]
    assert [window.learned.astype(int).tolist() for window in windows] == [
        [1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1],
    ]
    assert [window.documents for window in windows] == [("a", "b"), ("b",), ("c",)]


def test_a_window_of_one_token_behind_a_repeated_prefix_is_too_short() -> None:
    source = [begun([BOS], [3, 4, 5, 6]), begun([BOS], [7])]
    samples, left_out = make_samples(source, max_seq_len=4, vocab_size=100)
    assert [sample.tokens.tolist() for sample in samples] == [[BOS, 3, 4, 5], [BOS, 7]]
    assert left_out == LeftOut(too_short=1)


def test_a_sample_of_two_documents_names_both() -> None:
    source = [begun([], [3, 4, 5, 6], "a"), begun([], [7, 8, 3, 4], "b"), begun([], [3, 4], "a")]
    samples, left_out = make_samples(source, max_seq_len=2, vocab_size=100)
    assert [(sample.tokens.tolist(), sample.documents) for sample in samples] == [
        ([3, 4], ("a", "b")),
        ([5, 6], ("a",)),
        ([7, 8], ("b",)),
    ]
    assert left_out.duplicates == 2
    # Where it comes from is no part of what a sample is.
    assert samples[0].id == Sample(tokens=samples[0].tokens, loss_mask=samples[0].loss_mask).id


def test_no_room_behind_the_prefix_is_refused() -> None:
    with pytest.raises(RequestError, match="--max-seq-len 2: the tokenizer puts 2 tokens in front"):
        make_samples([begun([BOS, SOP], [3, 4])], max_seq_len=2, vocab_size=100)
