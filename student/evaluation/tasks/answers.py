"""Short answers to questions: prompts of SQuAD and HotpotQA, and the scores that both data sets define.

An answer is compared in lower case, without punctuation, articles and double blanks; the best of several
right answers counts (Rajpurkar et al. 2016, arXiv:1606.05250; Yang et al. 2018, arXiv:1809.09600).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words of an answer that are compared."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones."""
    return float(any(words(answer) == words(one) for one in right))


def overlap(answer: str, right: Sequence[str]) -> float:
    """Largest F1 of the answer's words with those of a right one."""
    return max(_f1(words(answer), words(one)) for one in right)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _scores(answer: str, right: Sequence[str]) -> dict[str, float]:
    return {"exact": exact(answer, right), "f1": overlap(answer, right)}


def squad_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of one record of SQuAD."""
    return _scores(results[0], doc["answers"]["text"])


def hotpot_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of one record of HotpotQA; a yes or no matches nothing else."""
    return _scores(results[0], [doc["answer"]])


def hotpot_prompt(doc: Mapping[str, Any]) -> str:
    """All paragraphs, those that matter and those that distract, and the question."""
    context = doc["context"]
    paragraphs = [
        f"{title}: {''.join(sentences).strip()}"
        for title, sentences in zip(context["title"], context["sentences"], strict=True)
    ]
    return "\n".join([*paragraphs, "", f"Question: {doc['question']}", "Answer:"])
