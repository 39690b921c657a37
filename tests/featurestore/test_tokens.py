"""A text token by token: coloured by its numbers, with details, whatever its tokens are."""

from __future__ import annotations

import pytest

from distily.html.page import Html, page
from distily.html.style import MAX_SHADES
from distily.html.tokens import ENTROPY, Guesses, Shade, Word, coloured_text, visible
from distily.text import token_text
from tests import html
from tests.teachers import word_tokenizer

EVIL = "</span></label><script>alert(1)</script>\" ' &"
OTHER = Shade("surprise", (1, 2, 3, 4), ("a", "b", "c", "d", "e"))


def guesses(who: str = "teacher", actual: int | None = 1) -> Guesses:
    return Guesses(who=who, remark="KL 0.5 nats", best=[("' a'", 0.625), ("' the'", 0.25)], actual=actual)


def word(text: str = " the", values: tuple[float | None, ...] = (0.3, 9.0)) -> Word:
    return Word(text=text, values=values, title=f"Position 7: {text!r}", guesses=[guesses()])


def read(text: Html) -> html.Parsed:
    return html.page(page("Tokens", text))


def test_a_token_has_a_colour_for_each_number_and_its_details() -> None:
    text = coloured_text("k", "Sample", (ENTROPY, OTHER), [Word(text="Once"), word(values=(0.3, 9.0))])
    found = read(text)
    # The first of five colours is for values up to the first edge.
    assert [ENTROPY.step(value) for value in (0.0, 0.1, 0.11, 0.5, 2.0, 3.0, 99.0)] == [0, 0, 1, 1, 3, 3, 4]
    assert found.texts["label"] == ["the teacher's entropy", "surprise", " the"]
    assert "s01 s14" in found.attributes["class"]
    assert found.texts["bdi"] == ["' a'", "' the'"] and {"0.625", "0.25"} <= set(found.texts["span"])
    assert found.attributes["style"] == ["--p:62%", "--p:25%"]
    assert {"g", "g own"} <= set(found.attributes["class"])
    assert {"Position 7: ' the'", "teacher"} <= set(found.texts["b"]) and found.texts["small"] == [
        "KL 0.5 nats"
    ]
    # One choice of three radio buttons is made: that of the colours. Words are a group of their own.
    assert found.attributes["name"].count("wk") == 1 and found.attributes["name"].count("ck") == 2
    assert len(found.attributes["checked"]) == 1
    assert "Once" in found.texts["span"]


def test_a_number_that_is_not_known_has_no_colour() -> None:
    assert 'class="s10"' in coloured_text("k", "Sample", (ENTROPY, OTHER), [word(values=(None, 0.5))])


def test_one_number_alone_is_not_to_be_chosen() -> None:
    text = coloured_text("k", "Sample", [OTHER], [word(values=(2.5,))])
    found = read(text)
    assert found.texts["label"] == [" the"] and "hidden" in found.attributes
    assert "Colour: surprise. " in found.texts["p"]
    with pytest.raises(AssertionError):
        coloured_text("k", "Sample", [OTHER] * (MAX_SHADES + 1), [])


def test_tokens_and_names_are_escaped() -> None:
    evil = Guesses(who=EVIL, remark=EVIL, best=[(EVIL, float("1.5")), (EVIL, -1.0)], actual=None)
    shade = Shade(EVIL, OTHER.edges, [EVIL] * 5)
    words = [Word(text=EVIL), Word(text=EVIL, values=(1.0, None), title=EVIL, guesses=[evil, evil])]
    found = read(coloured_text("k", EVIL, [shade, OTHER], words))
    assert found.texts["bdi"] == [EVIL] * 4 and found.texts["small"] == [EVIL] * 2
    assert found.attributes["aria-label"][0] == EVIL
    assert found.attributes["style"] == ["--p:100%", "--p:0%"] * 2


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", " the"),
        ("\n\n", "↵\n↵\n"),
        ("a\tb", "a→\tb"),
        ("\r\x00\x1b[31m", "\\r\\x00\\x1b[31m"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\ud800", "\\ud800"),
        ("\xa0\ufeff", "\\xa0\\ufeff"),
        ("שלום", "שלום"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_control_characters_show_and_do_nothing(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_a_tokens_text_has_the_space_that_it_has_inside_a_text() -> None:
    tokenizer = word_tokenizer(199)
    ids = tokenizer("the teacher learns .").input_ids
    assert [token_text(tokenizer, token) for token in ids] == [" the", " teacher", " learns", " ."]


def test_no_colour_of_the_style_is_left_without_its_number() -> None:
    text = page(
        "Tokens", coloured_text("k", "Sample", [OTHER] * MAX_SHADES, [word(values=(9.0,) * MAX_SHADES)])
    )
    for place in range(MAX_SHADES):
        assert (
            f".by{place}:checked ~ .words .s{place}4" in text and f".by{place}:checked ~ .key{place}" in text
        )
        assert f'class="by{place}"' in text
