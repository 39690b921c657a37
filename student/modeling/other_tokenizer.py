"""A student's own tokenizer: found, compared with the teacher's, and made ready to read a cache with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distily.text import one_line
from featurestore.identity import digest
from featurestore.reader import CacheReader
from student.alignment.encoding import TextEncoder
from student.alignment.retokenise import Retokeniser
from student.alignment.vocabulary import Vocabulary, read_vocabulary
from student.data.retokenised import OtherTokens
from student.data.token_map import TokenMap, token_map
from student.errors import UserError
from student.modeling.tokenizer import load_tokenizer, local_files


def tokenizer_files_of(source: str, flag: str) -> Path:
    """The directory of a tokenizer's files; UserError where transformers cannot load it."""
    try:
        load_tokenizer(source)
        directory = local_files(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{flag}: transformers cannot load it ({one_line(error, None)})") from error
    if directory is None:
        raise UserError(f"{flag}: it has no tokenizer.json; save it with a fast tokenizer of transformers")
    return directory


def vocabulary_of(directory: Path, flag: str) -> tuple[Any, Vocabulary]:
    """A tokenizer and what its ids stand for; UserError where that cannot be told to the byte."""
    tokenizer = load_tokenizer(directory)
    try:
        return tokenizer, read_vocabulary(tokenizer)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def other_tokens(reader: CacheReader, student_dir: Path, longest: int | None) -> OtherTokens:
    """How the samples of a cache become those of a student with another tokenizer.

    longest: tokens of a sample that the student takes; None for any.
    """
    theirs, own = load_tokenizer(reader.teacher_dir), load_tokenizer(student_dir)
    try:
        retokenise = Retokeniser(theirs, own)
    except UserError as error:
        raise UserError(f"the tokenizer of the cache's teacher or of {student_dir}: {error}") from error
    written, student = own.backend_tokenizer.to_str(), retokenise.student
    return OtherTokens(
        teacher=retokenise.teacher,
        student=student,
        retokenise=retokenise,
        tokens=token_map(
            retokenise.teacher, student, TextEncoder(written, student), reader.identity.vocab_size
        ),
        digest=digest(written.encode()),
        longest=longest,
    )


class OwnTokenizer:
    """The tokenizer of a student that is not the teacher's. flag: how error lines name it.

    Raises:
        UserError: transformers cannot load it, or it cannot be told what bytes its ids stand for.
    """

    def __init__(self, directory: Path, flag: str) -> None:
        self.directory = directory
        self._tokenizer, self._vocabulary = vocabulary_of(directory, flag)

    @property
    def settings(self) -> dict[str, Any]:
        """What the configuration of a model says of it."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {name: getattr(self._tokenizer, name, None) for name in names}
        if special["pad_token_id"] in (special["bos_token_id"], special["eos_token_id"]):
            special["pad_token_id"] = None  # the embedding of padding is not trained, and theirs is
        return {"vocab_size": len(self._vocabulary.texts), **special}

    def check(self, config: Any, flag: str) -> None:
        """UserError where a model has not as many tokens."""
        size, needed = config.get_text_config().vocab_size, len(self._vocabulary.texts)
        if size < needed:
            raise UserError(
                f"{flag}: the student's vocabulary has {size} tokens, and its tokenizer {needed}; give it a "
                f"vocab_size of {needed} or more, or leave that out"
            )


class NewEmbeddings:
    """Embeddings of a student's tokens out of the teacher's: the mean of those of the teacher's tokens of its
    text, as in fast vocabulary transfer (Gee et al., EMNLP 2022); the mean of all for one without.
    """

    def __init__(self, teacher_dir: Path, student_dir: Path, size: int) -> None:
        tokenizer, teacher = vocabulary_of(teacher_dir, "the cache's teacher")
        _, student = vocabulary_of(student_dir, "--student-tokenizer")
        encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), teacher)
        self._map: TokenMap = token_map(student, teacher, encoder)
        self.size = size

    def __call__(self, rows_VD: Tensor) -> Tensor:
        """[V of the teacher, D] -> [V of the student, D]."""
        pieces_VL = torch.from_numpy(self._map.pieces_VL).long()
        real_VL = pieces_VL >= 0
        new = rows_VD.float().mean(0).expand(self.size, -1).clone()
        counts = real_VL.sum(-1)
        sums = torch.zeros(len(pieces_VL), rows_VD.shape[1])
        for column, real in zip(pieces_VL.T, real_VL.T, strict=True):
            sums[real] += rows_VD[column[real]].float()
        known = counts > 0
        new[: len(pieces_VL)][known] = sums[known] / counts[known].unsqueeze(-1)
        return new.to(rows_VD.dtype)
