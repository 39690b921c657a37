"""A text token by token: each coloured by a number, its details shown to a pointer that rests on it, to a
finger, and to the keyboard.

There is no script. Every token is a radio button with a label, so that a text is one stop of the tab key and
the arrow keys walk through it; a second group of radio buttons chooses which number the colours are of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from distily.html.page import Html, html
from distily.html.style import MAX_SHADES

# Of what is not printable, joiners alone are kept: scripts and emoji are built with them.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Shade:
    """A number that colours can be of. edges: four, ascending; the first colour is for values up to the first
    of them, the last one for values above the last. ranges: how the five colours are named.
    """

    name: str
    edges: Sequence[float]
    ranges: Sequence[str]

    def step(self, value: float) -> int:
        """Index of the colour of a value."""
        return bisect_left(self.edges, value)


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What a model expected in the place of a token. best: texts and probabilities, the best first; actual:
    the place of the token itself among them, None where it is not there.
    """

    who: str
    remark: str
    best: Sequence[tuple[str, float]]
    actual: int | None


@dataclass(frozen=True, kw_only=True)
class Word:
    """A token. values: one for each shade, None where it is not known. title: what its details begin with;
    guesses: what they set side by side. A word without guesses has no details.
    """

    text: str
    values: Sequence[float | None] = ()
    title: str = ""
    guesses: Sequence[Guesses] = ()


ENTROPY = Shade(
    "the teacher's entropy",
    (0.1, 0.5, 1.5, 3.0),
    ("up to 0.1 nats", "0.1 to 0.5", "0.5 to 1.5", "1.5 to 3", "over 3 nats"),
)


def coloured_text(key: str, label: str, shades: Sequence[Shade], words: Sequence[Word]) -> Html:
    """The text, below a choice of `shades` (MAX_SHADES at most) where there are several.

    key: letters and digits that tell the text from the others on its page. label: what a screen reader calls
    it.
    """
    assert len(shades) <= MAX_SHADES
    alone = len(shades) == 1
    choices = "".join(_choice(key, index, shade, alone) for index, shade in enumerate(shades))
    keys = "".join(_key(index, shade, alone) for index, shade in enumerate(shades))
    body = "".join(_word(f"w{key}", shades, word) for word in words)
    lead = "" if alone else '<span class="note">Colour: </span>'
    return Html(
        f'<div class="sample">{lead}{choices}{keys}'
        f'<div class="words" dir="auto" role="radiogroup" aria-label="{html(label)}">{body}</div></div>'
    )


def visible(text: str) -> str:
    """`text` as it can stand in a running text: line breaks and tabs marked, other control characters and
    marks that change the direction of what follows written as escapes.
    """
    if text.isprintable():
        return text
    marks = {"\n": "↵\n", "\t": "→\t"}
    return "".join(
        marks.get(one) or (one if one.isprintable() or one in _JOINERS else repr(one)[1:-1]) for one in text
    )


def _choice(key: str, index: int, shade: Shade, alone: bool) -> str:
    """A radio button; the one that is alone is not shown and only chosen."""
    name = f"c{key}-{index}"
    chosen = " checked" if index == 0 else ""
    button = f'<input type="radio" class="by{index}" name="c{key}" id="{name}"{chosen}'
    return f"{button} hidden>" if alone else f'{button}><label for="{name}">{html(shade.name)}</label>'


def _key(index: int, shade: Shade, alone: bool) -> str:
    steps = " ".join(f'<span class="h{step}">{html(name)}</span>' for step, name in enumerate(shade.ranges))
    lead = f"Colour: {html(shade.name)}. " if alone else ""
    return f'<p class="note key key{index}">{lead}{steps}</p>'


def _word(group: str, shades: Sequence[Shade], word: Word) -> str:
    text = html(visible(word.text))
    if not word.guesses:
        return f"<span>{text}</span>"
    colours = " ".join(
        f"s{index}{shade.step(value)}"
        for index, (shade, value) in enumerate(zip(shades, word.values, strict=True))
        if value is not None
    )
    guesses = "".join(map(_guesses, word.guesses))
    tip = f'<b>{html(word.title)}</b><span class="guesses">{guesses}</span>'
    return (
        f'<label class="{colours}"><input type="radio" name="{group}">{text}'
        f'<span class="tip" dir="ltr">{tip}</span></label>'
    )


def _guesses(guesses: Guesses) -> str:
    rows = "".join(
        f'<span class="g{" own" if place == guesses.actual else ""}" style="--p:{min(max(p, 0), 1):.0%}">'
        f"<bdi>{html(text)}</bdi> <span>{p:.3g}</span></span>"
        for place, (text, p) in enumerate(guesses.best)
    )
    return f"<span><b>{html(guesses.who)}</b> <small>{html(guesses.remark)}</small>{rows}</span>"
