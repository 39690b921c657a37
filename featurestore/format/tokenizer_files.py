"""The files that make a tokenizer: hashed as part of the teacher's identity, kept in a store, given to
students. Both stages use this one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from distily.safety.parsing import MAX_JSON, read_json, read_limited
from featurestore.errors import StoreFormatError
from featurestore.identity import FILE_NAME, check_id

CONFIG_FILE = "tokenizer_config.json"
# With a tokenizer.json, the identity of a tokenizer is these files: the ids are those of tokenizer.json.
IDENTITY_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# Every file that the tokenizers of transformers read or `save_pretrained` writes.
TOKENIZER_FILES = (
    *IDENTITY_FILES,
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.model.v3",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
)
# Chat templates with a name lie in a folder of a checkpoint, and beside the other files in a store, whose
# names have no slashes.
TEMPLATE_FOLDER = "additional_chat_templates"
_TEMPLATE_PREFIX = f"{TEMPLATE_FOLDER}."
# For downloads and uploads. The code of a tokenizer is kept too, and runs with --trust-remote-code only.
TOKENIZER_PATTERNS = (*TOKENIZER_FILES, "*.tiktoken", f"{TEMPLATE_FOLDER}/*.jinja")


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Name in a store -> content, of every tokenizer file in `directory`, a checkpoint or a store's teacher/.

    Raises:
        StoreFormatError: a chat template has a name that a store cannot keep, or a file is too large for one.
    """
    paths = {name: directory / name for name in TOKENIZER_FILES}
    paths |= {path.name: path for path in directory.glob("*.tiktoken")}
    paths |= {path.name: path for path in directory.glob(f"{_TEMPLATE_PREFIX}*.jinja")}
    paths |= {f"{_TEMPLATE_PREFIX}{path.name}": path for path in directory.glob(f"{TEMPLATE_FOLDER}/*.jinja")}
    if _has_code(directory / CONFIG_FILE):
        paths |= {path.name: path for path in directory.glob("*.py")}
    found = {
        check_id(name, FILE_NAME, str(directory)): path for name, path in paths.items() if path.is_file()
    }
    return {name: _content(path) for name, path in sorted(found.items())}


def _content(path: Path) -> bytes:
    try:
        return read_limited(path, MAX_JSON)
    except (OSError, ValueError) as error:
        raise StoreFormatError(f"{path}: no file of a tokenizer: {error}") from None


def write_tokenizer_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Write what `tokenizer_files` gave as a checkpoint has it. A file that is there stays."""
    for name, data in files.items():
        path = directory / name
        if name.startswith(_TEMPLATE_PREFIX):
            path = directory / TEMPLATE_FOLDER / name.removeprefix(_TEMPLATE_PREFIX)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """64 hex digits over names and contents of the files that decide on the ids."""
    names = set(files).intersection(IDENTITY_FILES) if "tokenizer.json" in files else files
    digest = blake3()
    for name in sorted(names):
        digest.update(blake3(name.encode()).digest() + blake3(files[name]).digest())
    return str(digest.hexdigest())


def _has_code(config: Path) -> bool:
    """Whether tokenizer_config.json names a tokenizer whose code lies in the checkpoint."""
    try:
        found = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "auto_map" in found
