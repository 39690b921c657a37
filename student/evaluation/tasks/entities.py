"""Named entities as text, for CoNLL-2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050).

The model writes what it finds as `PER: Ada Lovelace; LOC: London`, or `none`. An entity counts as found when
type and words are right, as often as it stands in the sentence: the entity F1 of the data set, but that
places are not compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
NONE = "none"
Entity = tuple[str, str]


def tagged(tokens: Sequence[str], tags: Sequence[int]) -> list[Entity]:
    """(type, words) of every entity; tags: numbers of TAGS."""
    found: list[tuple[str, list[str]]] = []
    before = "O"
    for token, number in zip(tokens, tags, strict=True):
        tag = TAGS[number]
        if tag.startswith("I-") and before[2:] == tag[2:]:
            found[-1][1].append(token)
        elif tag != "O":
            found.append((tag[2:], [token]))
        before = tag
    return [(kind, " ".join(words)) for kind, words in found]


def written(text: str) -> list[Entity]:
    """The entities that a line of text names; what has no type in front is none."""
    parts = (part.partition(":") for part in text.strip().splitlines()[0].split(";")) if text.strip() else ()
    return [(kind.strip().upper(), " ".join(words.split())) for kind, colon, words in parts if colon]


def prompt(doc: Mapping[str, Any]) -> str:
    """The sentence, and what is asked for."""
    return f"Sentence: {' '.join(doc['tokens'])}\nEntities (PER, ORG, LOC, MISC):"


def target(doc: Mapping[str, Any]) -> str:
    """What should be written."""
    named = tagged(doc["tokens"], doc["ner_tags"])
    return "; ".join(f"{kind}: {words}" for kind, words in named) or NONE


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Counts of one sentence: found and right, written, in the sentence."""
    named, wrote = Counter(tagged(doc["tokens"], doc["ner_tags"])), Counter(written(answers[0]))
    return {"entity_f1": ((named & wrote).total(), wrote.total(), named.total())}


def micro_f1(counts: Iterable[tuple[int, int, int]]) -> float:
    """F1 of all sentences' counts together; 0 where nothing was found."""
    right, wrote, named = (sum(column) for column in zip(*counts, strict=True))
    return float(2 * right / max(wrote + named, 1))
