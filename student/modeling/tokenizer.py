"""Tokenizers as students get them: with the ids of tokenizer.json, whatever class its configuration names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from distily.checkpoint.tokenizer_check import PROBES, differing_text, without_overrides
from featurestore.format.tokenizer_files import CONFIG_FILE, tokenizer_files, write_tokenizer_files
from student.errors import UserError


def load_tokenizer(source: str | Path, **options: Any) -> Any:
    """The tokenizer of a directory or hub name, with the ids of its tokenizer.json where it has one.

    options: for transformers' `from_pretrained`; code that comes with a tokenizer does not run unless
    `trust_remote_code` is among them.

    Raises:
        UserError: transformers cannot load it with the ids of its tokenizer.json.
        OSError, ValueError, KeyError: what transformers raises where there is none.
    """
    from transformers import AutoTokenizer

    options = {"trust_remote_code": False, **options}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    directory = local_files(source)
    if directory is None or _differing(tokenizer, directory) is None:
        return tokenizer
    with tempfile.TemporaryDirectory() as name:
        copy_tokenizer(directory, Path(name))
        return AutoTokenizer.from_pretrained(name, **options)


def auto_tokenizer_fits(directory: Path) -> bool:
    """Whether AutoTokenizer gives the ids of the tokenizer.json beside a model's config.json.

    For some types of models (qwen2) it takes the tokenizer of their family, whatever tokenizer_config.json
    names; `PreTrainedTokenizerFast` takes the file as it is.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        return True
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # whatever the backend of another family raises
        return False
    return _differing(tokenizer, directory) is None


def cut_alike(one: Path, other: Path) -> bool:
    """Whether two tokenizer.json files of one vocabulary give the same ids to some texts; True where one
    cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        found = [Tokenizer.from_file(str(file)) for file in (one, other)]
    except Exception:  # the library raises bare exceptions
        return True
    for tokenizer in found:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    own, theirs = (
        [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES] for tokenizer in found
    )
    return bool(own == theirs)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files. A file that is there stays.

    Where the class that tokenizer_config.json names gives other ids than tokenizer.json, the copy names the
    one that takes tokenizer.json as it is, so that everyone's `from_pretrained` gives the teacher's ids.

    Raises:
        UserError: no class does.
    """
    files = tokenizer_files(source)
    if CONFIG_FILE in files and not (target / CONFIG_FILE).is_file():
        files[CONFIG_FILE] = _config_for(source, files[CONFIG_FILE])
    write_tokenizer_files(files, target)


def _config_for(source: Path, config: bytes) -> bytes:
    """tokenizer_config.json, corrected where that is needed."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (source / "tokenizer.json").is_file():
        return config
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # whatever its backend raises; the file may load all the same
        tokenizer = None
    if tokenizer is not None and _differing(tokenizer, source) is None:
        return config
    corrected = without_overrides(config)
    with tempfile.TemporaryDirectory() as name:
        files = {**tokenizer_files(source), CONFIG_FILE: corrected}
        write_tokenizer_files(files, Path(name))
        text = _differing(PreTrainedTokenizerFast.from_pretrained(name), Path(name))
    if text is not None:
        raise UserError(
            f"{source}: transformers gives {text!r} other ids than tokenizer.json does; save the tokenizer "
            "anew with PreTrainedTokenizerFast(tokenizer_file=...).save_pretrained"
        )
    return corrected


def _differing(tokenizer: Any, directory: Path) -> str | None:
    file = directory / "tokenizer.json"
    return differing_text(tokenizer, file) if file.is_file() else None


def local_files(source: str | Path) -> Path | None:
    """The directory of a tokenizer's files; None where they are not on this machine."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    found = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found).parent
