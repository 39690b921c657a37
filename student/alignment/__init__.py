"""A teacher's samples for a student with another tokenizer: the tokens, and where both have read the same."""

from student.alignment.retokenise import Counts, Retokenised, Retokeniser
from student.alignment.roles import match_specials, shared_ids
from student.alignment.spans import Alignment
from student.alignment.vocabulary import Vocabulary, read_vocabulary

__all__ = [
    "Alignment",
    "Counts",
    "Retokenised",
    "Retokeniser",
    "Vocabulary",
    "match_specials",
    "read_vocabulary",
    "shared_ids",
]
