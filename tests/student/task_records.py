"""A few records of each task family, in the format of its data set; the words are our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def _glue(key: str, other: str | None, labels: tuple[int, ...]) -> Rows:
    texts = [
        ("The cat sleeps on the mat.", "A cat is asleep."),
        ("It rains in the north today.", "The sun shines everywhere."),
        ("The bridge was built in a year.", "Nobody knows who built the bridge."),
    ]
    rows = zip(texts, labels, strict=False)
    return [
        {key: one, **({other: two} if other else {}), "label": label, "idx": index}
        for index, ((one, two), label) in enumerate(rows)
    ]


def _mmlu_pro(count: int) -> Rows:
    return [
        {
            "question_id": n,
            "question": f"What is {n} plus {n}?",
            "options": [str(2 * n + step) for step in range(-1, 9)],
            "answer": "B",
            "answer_index": 1,
            "cot_content": f"A: Let's think step by step. {n} and {n} make {2 * n}. The answer is (B).",
            "category": category,
            "src": "own",
        }
        for n in range(1, count + 1)
        for category in ("math", "law")
    ]


_MMLU: Rows = [
    {
        "question": "Which organ pumps blood?",
        "subject": "anatomy",
        "choices": ["lung", "heart", "liver", "eye"],
        "answer": 1,
    },
    {
        "question": "Where is the femur?",
        "subject": "anatomy",
        "choices": ["arm", "head", "leg", "hand"],
        "answer": 2,
    },
]
_SQUAD: Rows = [
    {
        "id": str(n),
        "title": "Harbour",
        "context": "The harbour of Lund was dug by hand in 1862 and closed forty years later.",
        "question": question,
        "answers": {"text": [answer, f"the {answer}"], "answer_start": [0, 0]},
    }
    for n, (question, answer) in enumerate([("When was it dug?", "1862"), ("How was it dug?", "by hand")])
]
_HOTPOT: Rows = [
    {
        "id": str(n),
        "question": question,
        "answer": answer,
        "type": "bridge",
        "level": "easy",
        "supporting_facts": {"title": ["Mill"], "sent_id": [0]},
        "context": {
            "title": ["Mill", "Ada Brook"],
            "sentences": [
                ["The mill was bought by Ada Brook. ", "It ground rye."],
                ["Ada Brook came from Bern."],
            ],
        },
    }
    for n, (question, answer) in enumerate(
        [("Where did the mill's buyer come from?", "Bern"), ("Did it grind rye?", "yes")]
    )
]
_TRIVIA: Rows = [
    {
        "question": question,
        "question_id": str(n),
        "answer": {"value": aliases[0], "aliases": aliases, "normalized_value": aliases[0].lower()},
    }
    for n, (question, aliases) in enumerate(
        [("What is the capital of Peru", ["Lima"]), ("Which metal is liquid", ["Mercury", "quicksilver"])]
    )
]
_MATH: Rows = [
    {"problem": "What is $3+4$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{7}$."},
    {
        "problem": "Halve $1$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "So $\\boxed{\\frac{1}{2}}$.",
    },
]
_CONLL: Rows = [
    {"id": "0", "tokens": ["Ada", "Brook", "left", "Bern", "."], "ner_tags": [1, 2, 0, 5, 0]},
    {"id": "1", "tokens": ["Rain", "came", "."], "ner_tags": [0, 0, 0]},
    {
        "id": "2",
        "tokens": ["Acme", "hired", "Ada", "Brook", ";", "Acme", "grew", "."],
        "ner_tags": [3, 0, 1, 2, 0, 3, 0, 0],
    },
    {"id": "3", "tokens": ["The", "Dutch", "won", "."], "ner_tags": [0, 7, 0, 0]},
]
RECORDS: dict[str, Rows] = {
    "rajpurkar/squad/validation": _SQUAD,
    "hotpotqa/hotpot_qa/distractor/validation": _HOTPOT,
    "mandarjoshi/trivia_qa/rc.nocontext/validation": _TRIVIA,
    "EleutherAI/hendrycks_math/algebra/test": _MATH,
    "cais/mmlu/anatomy/test": _MMLU,
    "cais/mmlu/anatomy/dev": _MMLU,
    "TIGER-Lab/MMLU-Pro/test": _mmlu_pro(2),
    "TIGER-Lab/MMLU-Pro/validation": _mmlu_pro(5),
    "eriktks/conll2003/train": _CONLL,
    "eriktks/conll2003/test": _CONLL[:3],
    "nyu-mll/glue/cola/validation": _glue("sentence", None, (1, 0)),
    "nyu-mll/glue/sst2/validation": _glue("sentence", None, (1, 0, 0)),
    "nyu-mll/glue/mrpc/validation": _glue("sentence1", "sentence2", (1, 0)),
    "nyu-mll/glue/qqp/validation": _glue("question1", "question2", (1, 0)),
    "nyu-mll/glue/rte/validation": _glue("sentence1", "sentence2", (0, 1)),
    "nyu-mll/glue/wnli/validation": _glue("sentence1", "sentence2", (1, 0)),
    "nyu-mll/glue/qnli/validation": _glue("question", "sentence", (0, 1)),
    "nyu-mll/glue/mnli/validation_matched": _glue("premise", "hypothesis", (0, 2, 1)),
    "nyu-mll/glue/mnli/validation_mismatched": _glue("premise", "hypothesis", (0, 2, 1)),
}
# One task of each family of the suite `seed`; groups of many subjects by one of these.
FAMILIES = (
    "hotpotqa",
    "hotpotqa_closed",
    "triviaqa",
    "glue",
    "squad",
    "conll2003",
    "mmlu_anatomy",
    "mmlu_pro_math",
    "hendrycks_math_algebra",
)


def write_records(directory: Path) -> Path:
    """All of RECORDS, as --task-data wants them."""
    for name, rows in RECORDS.items():
        file = directory / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    return directory
