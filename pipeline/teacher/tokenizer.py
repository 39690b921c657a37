"""The teacher's tokenizer: loaded so that its ids are those of the checkpoint's own files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from distily.checkpoint.tokenizer_check import differing_text, without_overrides
from distily.text import one_line
from featurestore.format.tokenizer_files import CONFIG_FILE, tokenizer_files, write_tokenizer_files
from pipeline.errors import RequestError
from pipeline.teacher.checkpoint import Teacher


def load_tokenizer(teacher: Teacher, trust_remote_code: bool = False) -> Any:
    """The tokenizer of transformers, with the ids of the checkpoint's tokenizer.json where there is one.

    Raises:
        RequestError: it does not load.
    """
    try:
        return tokenizer_of(teacher.path, trust_remote_code)
    except Exception as error:  # tokenizers raise whatever their backend raises
        raise RequestError(
            f"TEACHER {teacher.name}: its tokenizer does not load: {one_line(error)}"
        ) from error


def tokenizer_of(directory: Path, trust_remote_code: bool = False) -> Any:
    """The same from a directory; raises whatever transformers does, and ValueError where the ids of
    tokenizer.json cannot be had.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    file = directory / "tokenizer.json"
    if not file.is_file() or differing_text(tokenizer, file) is None:
        return tokenizer
    files = tokenizer_files(directory)
    files[CONFIG_FILE] = without_overrides(files.get(CONFIG_FILE, b"{}"))
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(files, Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = differing_text(tokenizer, file)
    if text is not None:
        raise ValueError(
            f"transformers gives {text!r} other ids than {file} does; save the tokenizer anew with "
            "PreTrainedTokenizerFast(tokenizer_file=...).save_pretrained"
        )
    return tokenizer


def check_kept_files(teacher: Teacher, tokenizer: Any, trust_remote_code: bool = False) -> None:
    """A student gets the files that are kept of the teacher: they have to make the same tokenizer.

    tokenizer: of the whole checkpoint.

    Raises:
        RequestError: they make another vocabulary, or none.
    """
    if (teacher.path / "tokenizer.json").is_file():
        return  # load_tokenizer has compared the ids
    config = teacher.path / "config.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer_files({**tokenizer_files(teacher.path), config.name: config.read_bytes()}, folder)
        try:
            same = tokenizer_of(folder, trust_remote_code).get_vocab() == tokenizer.get_vocab()
        except Exception:  # as above; without a file that is not kept, all kinds of errors
            same = False
    if not same:
        raise RequestError(
            f"TEACHER {teacher.name}: its tokenizer reads files that a cache does not keep, so students "
            "would get another vocabulary; save it as tokenizer.json: "
            f"AutoTokenizer.from_pretrained({teacher.name!r}).save_pretrained(...)"
        )
