"""A teacher's samples in the tokens of another tokenizer, against a plain comparison of all that was read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from student.alignment import Counts, Retokenised, Retokeniser, Vocabulary
from student.alignment.roles import written_out
from tests.student.vocabularies import EXACT, HARD, LOSSY, hard_texts, made

DUMMY = "a space that no text has"
Units = list[list[object]]


class Case:
    """A teacher, a student and the retokeniser between them; made once."""

    def __init__(self, teacher: Any, student: Any) -> None:
        self.tokenizer, self.own = teacher, student
        self.retokenise = pickle.loads(pickle.dumps(Retokeniser(teacher, student)))
        self.teacher: Vocabulary = self.retokenise.teacher
        self.student: Vocabulary = self.retokenise.student


@pytest.fixture(scope="module")
def demo_tokenizer(demo: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo / "teacher")


@pytest.fixture(scope="module")
def case(demo_tokenizer: Any) -> Any:
    found: dict[tuple[str, str], Case] = {}

    def get(teacher: str, student: str) -> Case:
        if (teacher, student) not in found:
            pair = (demo_tokenizer if kind == "demo" else made(kind) for kind in (teacher, student))
            found[teacher, student] = Case(*pair)
        return found[teacher, student]

    return get


@st.composite
def samples(draw: st.DrawFn, tokenizer: Any, special: list[int]) -> tuple[list[int], list[bool]]:
    """Texts and special tokens in turn, cut anywhere."""
    ids: list[int] = []
    for text in draw(st.lists(hard_texts, min_size=1, max_size=3)):
        ids += tokenizer.encode(text, add_special_tokens=draw(st.booleans()))
        ids += [draw(st.sampled_from(special))] if special and draw(st.booleans()) else []
    start = draw(st.sampled_from([0, 0, 1, 2]))
    ids = ids[start : len(ids) - draw(st.sampled_from([0, 0, 1]))]
    return ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))


def units_of_teacher(ids: list[int], case: Case) -> Units:
    """What each token of the teacher says."""
    units: Units = []
    begins, texts = True, 0
    for place, index in enumerate(ids):
        roles = case.teacher.roles.get(index)
        if roles is None:
            piece: list[object] = list(case.teacher.texts[index])
            if (
                begins
                and piece[:1] == [32]
                and case.teacher.space in ("always", "first" if texts == 0 else "")
            ):
                piece[0] = DUMMY
            texts += 1
        elif index in case.retokenise.specials:
            piece = [("special", case.retokenise.specials[index])]
        else:
            piece = list(written_out(roles))
        begins = roles is not None
        units.append([] if roles and place == 0 and "bos" in roles else piece)
    return units


def units_of_student(ids: list[int], case: Case, teacher: Units) -> Units:
    """What each token of the student says: between special tokens its text is the teacher's, perhaps behind a
    space more.
    """
    special = case.student.roles
    units: Units = [[("special", id)] if id in special else list(case.student.texts[id]) for id in ids]
    front = len(case.student.prefix)
    assert tuple(ids[:front]) == case.student.prefix
    units[:front] = [[]] * front
    own, wanted = (
        _runs([unit for piece in side for unit in piece if unit != DUMMY]) for side in (units, teacher)
    )
    assert len(own) == len(wanted)
    place = 0
    for said, text in zip(own, wanted, strict=True):
        assert said in (text, [32, *text])
        if said != text:
            _replace(units, place, DUMMY)
        place += len(said)
    return units


def _runs(stream: list[object]) -> list[list[object]]:
    """Runs of text, of nothing too, with the special tokens in between."""
    runs: list[list[object]] = [[]]
    for unit in stream:
        runs += [[unit], []] if isinstance(unit, tuple) else []
        runs[-1] += [] if isinstance(unit, tuple) else [unit]
    return runs


def _replace(units: Units, place: int, new: object) -> None:
    """Unit number `place` of all."""
    for piece in units:
        if place < len(piece):
            piece[place] = new
            return
        place -= len(piece)


def pairs_that_read_the_same(teacher: Units, student: Units) -> list[list[int]]:
    """The pairs of tokens up to which the same was said, and after which the same spaces follow."""

    def last_of_equal(units: Units) -> dict[tuple[object, ...], int]:
        read = [unit for piece in units for unit in piece]
        found = {}
        for token in range(len(units)):
            count = sum(map(len, units[: token + 1]))
            found[tuple(unit for unit in read[:count] if unit != DUMMY)] = token
        return found

    def rest(units: Units, token: int) -> list[object]:
        return [unit for piece in units[token + 1 :] for unit in piece]

    ours, theirs = last_of_equal(student), last_of_equal(teacher)
    pairs = sorted((t, ours[read]) for read, t in theirs.items() if read in ours)
    return [[t, s] for t, s in pairs if rest(teacher, t)[:1] == rest(student, s)[:1]]


def check(found: Retokenised, ids: list[int], mask: list[bool], case: Case) -> None:
    """All that is promised of a student's tokenizer that loses nothing."""
    teacher = units_of_teacher(ids, case)
    student = units_of_student(found.ids_S.tolist(), case, teacher)
    pairs = pairs_that_read_the_same(teacher, student)
    assert found.alignment.boundaries_A2.tolist() == pairs
    if ids and len(found.ids_S):
        assert pairs[-1] == [len(ids) - 1, len(found.ids_S) - 1]  # the spans cover everything
    learned = learned_units(teacher, mask)
    place, expected = 0, []
    for token, piece in enumerate(student):
        width = sum(unit != DUMMY for unit in piece)
        expected.append(all(learned[place : place + max(width, 1)]) and token >= len(case.student.prefix))
        place += width
    assert found.loss_mask_S.tolist() == expected
    assert found.counts.changed_bytes == 0
    assert found.counts.undecodable_bytes == len(undecodable(teacher))
    assert found.counts.text_bytes == len(
        [unit for piece in teacher for unit in piece if isinstance(unit, int)]
    )


def learned_units(teacher: Units, mask: list[bool]) -> list[bool]:
    """Of each unit, whether it is learned: it is of a learned token and of a whole character."""
    learned = [is_on for is_on, piece in zip(mask, teacher, strict=True) for unit in piece if unit != DUMMY]
    for place in undecodable(teacher):
        learned[place] = False
    return learned


def undecodable(teacher: Units) -> list[int]:
    """The places of bytes that are in no whole character."""
    places, start = [], 0
    for run in _runs([unit for piece in teacher for unit in piece if unit != DUMMY]):
        text = bytes(unit for unit in run if isinstance(unit, int))
        at = 0
        while at < len(text):
            width = next((width for width in range(1, 5) if is_whole(text[at : at + width])), 0)
            places += [] if width else [start + at]
            at += width or 1
        start += len(run)
    return places


def is_whole(part: bytes) -> bool:
    try:
        return bool(part.decode())
    except UnicodeDecodeError:
        return False


def special_ids(case: Case) -> list[int]:
    """Those that the student has as well, and two that it may lack."""
    known = [index for index, roles in case.teacher.roles.items() if roles[-1] != "unk"]
    mapped = [index for index in known if index in case.retokenise.specials]
    return mapped + [index for index in known if index not in mapped][:2]


PAIRS = [("demo", kind) for kind in EXACT] + [
    (teacher, student) for teacher in EXACT for student in EXACT if teacher != student
]


@pytest.mark.parametrize(
    ("teacher", "student"), [pair for pair in PAIRS if "demo" in pair or "bytes" in pair]
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_pairs_are_those_that_read_the_same(
    case: Any, teacher: str, student: str, data: st.DataObject
) -> None:
    chosen = case(teacher, student)
    ids, mask = data.draw(samples(chosen.tokenizer, special_ids(chosen)))
    check(chosen.retokenise(ids, mask), ids, mask, chosen)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), pair=st.sampled_from(PAIRS))
def test_any_teacher_and_any_student(case: Any, data: st.DataObject, pair: tuple[str, str]) -> None:
    chosen = case(*pair)
    ids, mask = data.draw(samples(chosen.tokenizer, special_ids(chosen)))
    check(chosen.retokenise(ids, mask), ids, mask, chosen)


@pytest.mark.parametrize("student", EXACT)
def test_hard_texts_cut_anywhere(case: Any, student: str) -> None:
    """Every window of each text between plain ones, so that all of its characters are cut everywhere."""
    chosen = case("demo", student)
    for text in HARD:
        ids = chosen.tokenizer.encode(f"the {text}{text} hello")
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                mask = [place % 3 > 0 for place in range(start, end)]
                check(chosen.retokenise(ids[start:end], mask), ids[start:end], mask, chosen)


def test_a_space_that_no_text_has_is_no_context_of_the_others(case: Any) -> None:
    """Behind </s> the student goes on with "▁hello", which is not the teacher's "hello"."""
    chosen = case("demo", "bpe_prepend")
    (hello,), end = chosen.tokenizer.encode("hello"), 0
    found = chosen.retokenise([hello, end, hello], [True] * 3)
    assert chosen.own.convert_ids_to_tokens(found.ids_S.tolist()) == ["<s>", "▁hello", "</s>", "▁hello"]
    assert found.alignment.boundaries_A2.tolist() == [[0, 1], [2, 3]]


def spans_of(
    case: Case, text: str, learned: str = ""
) -> tuple[list[tuple[str, list[str]]], list[str], Counts]:
    """(the teacher's text of each span with the student's tokens of it, which of these are learned, counts).

    learned: the teacher's words that are.
    """
    ids = case.tokenizer.encode(text)
    texts = [case.teacher.texts[index] for index in ids]
    found = case.retokenise(ids, [part.strip().decode(errors="ignore") in learned.split() for part in texts])
    own = case.own.convert_ids_to_tokens(found.ids_S.tolist())
    spans, t0, s0 = [], 0, len(case.student.prefix)
    for t1, s1 in (found.alignment.boundaries_A2 + 1).tolist():
        spans.append((b"".join(texts[t0:t1]).decode(), own[s0:s1]))
        t0, s0 = t1, s1
    return spans, [token for token, on in zip(own, found.loss_mask_S, strict=True) if on], found.counts


def test_lower_case_without_accents(case: Any) -> None:
    """The tokenizer says which characters it made its tokens of; white space is never a token's."""
    spans, learned, counts = spans_of(case("demo", "word_piece"), "The caf\u00e9 learns,\n the", "learns")
    assert spans == [
        ("The", ["the"]),
        (" caf\u00e9", ["cafe"]),
        (" learns", ["learns"]),
        (",", [","]),
        ("\n the", ["the"]),
    ]
    assert learned == ["learns"]
    assert counts.changed_bytes == len("The caf\u00e9\n the".encode())


@pytest.mark.parametrize(
    ("student", "text", "expected", "changed"),
    [
        ("nfkc", "the \ufb01ne \u2460a", ["the", " \ufb01", "ne", " \u2460", "a"], "\ufb01\u2460"),
        ("nfd", "a caf\u00e9 hello", ["a", " caf\u00e9", " hello"], "caf\u00e9"),
        ("lowercase", "HELLO the", ["HELLO", " the"], "HELLO"),
        ("unknown", "hello \u00df the", ["hello", " \u00df", " the"], "\u00df"),
        ("gaps", "a12 the 12", ["a", "1", "2"], " the 12"),  # it drops the space, and says wrong places
        ("bpe_first", "a\u2581b hello", ["a", "\u2581", "b", " hello"], "\u2581"),
    ],
)
def test_what_changes_is_counted(
    case: Any, student: str, text: str, expected: list[str], changed: str
) -> None:
    spans, _, counts = spans_of(case("demo", student), text)
    assert [span for span, _ in spans] == expected
    assert counts.changed_bytes == len(changed.encode())


@pytest.mark.parametrize("student", [*LOSSY, "bpe_first", "unigram_always"])
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(text=hard_texts, marks=st.booleans())
@example(text="e\u0301\u0323", marks=False)  # marks that a normaliser puts in another order
def test_a_tokenizer_that_loses_something_is_never_taken_for_further_than_it_is(
    case: Any, student: str, text: str, marks: bool
) -> None:
    """What it has read at a pair is what it makes of what the teacher has read, byte by byte here."""
    chosen = case("bytes", student)
    text = text.replace("b", "\u2581") if marks else text
    ids = chosen.tokenizer.encode(text)
    found = chosen.retokenise(ids, [True] * len(ids))
    own = found.ids_S.tolist()
    for t, s in found.alignment.boundaries_A2.tolist():
        assert _reads(chosen, text.encode()[: t + 1], own[len(chosen.student.prefix) : s + 1])
    assert found.counts.changed_bytes <= found.counts.text_bytes


def _reads(case: Case, text: bytes, ids: list[int]) -> bool:
    """Whether these are tokens of a text, as the tokenizer changes it; unknown ones are of any text."""
    backend, vocabulary = case.own.backend_tokenizer, case.student
    own = [vocabulary.texts[index] for index in ids]
    spaced = text if vocabulary.space == "never" else text.replace("\u2581".encode(), b" ")
    if b"".join(own) in (text, b" " + text, spaced, b" " + spaced):
        return True
    if min(vocabulary.byte_ids) < 0 and case.own.unk_token_id is None:  # it drops bytes
        return b"".join(own) == bytes(byte for byte in text if vocabulary.byte_ids[byte] >= 0)
    if text and not is_whole(text):
        return False
    words = case.own.unk_token == "[UNK]"
    normal = text.decode()
    if case.student.space != "never" and not words:
        normal = normal.replace("\u2581", " ")
    if backend.normalizer is not None:
        normal = backend.normalizer.normalize_str(normal)
    if words:
        normal, own = "".join(normal.split()), [part.strip() for part in own]
    unknown = case.own.unk_token_id
    parts = [None if index == unknown else part for index, part in zip(ids, own, strict=True)]
    return _matches([part for part in parts if part != b""], normal.removeprefix(" ").encode())


def _matches(parts: list[bytes | None], text: bytes) -> bool:
    """Whether a text is made of these parts, the first one without its space; None: of one byte or more."""
    ends = {0}  # in the text, of what was read so far; a regular expression takes exponential time
    for number, part in enumerate(parts):
        if part is None:
            ends = set(range(min(ends, default=len(text)) + 1, len(text) + 1))
        else:
            known = part if number else part.removeprefix(b" ")
            ends = {end + len(known) for end in ends if text.startswith(known, end)}
    return len(text) in ends
