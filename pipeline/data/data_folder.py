"""Which files of a local data set are read for a split: as `datasets` names splits, over literal paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distily.datafiles import UNDERSTOOD, kind_of
from distily.safety.parsing import parse_yaml, read_limited
from distily.text import one_line
from pipeline.errors import RequestError

# Beside data, these are about it.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|contributing|code_of_conduct|datasheet)\b.*"
    r"|(dataset_infos?|dataset_dict|state|config)\.json",
    re.IGNORECASE,
)
# Data that nobody should find missing later, in containers that are not opened here.
_CONTAINERS = (
    ".zip",
    ".tar",
    ".tgz",
    ".xz",
    ".7z",
    ".rar",
    ".lz4",
    ".xlsx",
    ".feather",
    ".gz",
    ".zst",
    ".bz2",
)
# A card lists the columns and sizes of each of its configurations, of which there may be hundreds.
_CARD_BYTES, _CARD_NODES = 2**23, 500_000


@dataclass(frozen=True)
class LocalFiles:
    """Files of one kind, a value of `distily.datafiles.KINDS`, by split; in the order of reading."""

    kind: str
    splits: Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one split."""

    split: str
    start: int
    stop: int


def find_files(path: Path, dataset: str, config: str | None) -> LocalFiles:
    """The files of a local data set, `dataset` as the user names it.

    Raises:
        RequestError: none, or none of a kind that is understood; several kinds; a file that belongs to no
            split while others do; a configuration that is not there, or is not named.
    """
    if path.is_file():
        if config is not None:
            raise _no_configuration(dataset, config)
        return LocalFiles(_one_kind([path], dataset), {"train": [path]})
    names = [str(name) for name in _names(path)]
    configs, default = _configurations(path, dataset)
    if config is not None and not configs:
        raise _no_configuration(dataset, config)
    if configs:
        patterns = configs[_configuration(configs, config or default, dataset)]
        names = [name for name in names if any(_matches(name, each) for each in patterns.values())]
        splits = {split: [n for n in names if _matches(n, each)] for split, each in patterns.items()}
        kind = _one_kind([path / name for name in names], dataset)
    else:
        names = _without_what_is_about(names)
        kind = _one_kind([path / name for name in names], dataset)
        splits = _splits(names, kind, dataset)
    files = {split: [path / name for name in of_split] for split, of_split in splits.items() if of_split}
    return LocalFiles(kind, files)


def split_names(split: str, available: Sequence[str], dataset: str) -> list[str]:
    """The splits that a value of --split names, e.g. two in `train[:10%]+test`.

    Raises:
        RequestError: it is no such value, or names a split that is not there.
    """
    from datasets import ReadInstruction

    try:
        ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise RequestError(
            f"--split {split}: give the name of a split or a slice of it, e.g. train[:9] ({one_line(error)})"
        ) from error
    names = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for name in names:
        if name not in available:
            raise RequestError(f"--split {split}: {dataset} has {', '.join(available)}; give one of these")
    return list(dict.fromkeys(names))


def pieces_of(split: str, lengths: Mapping[str, int]) -> list[Piece]:
    """The rows that a value of --split names, of splits with so many rows; empty pieces are left out.

    Raises:
        RequestError: a slice reaches beyond its split.
    """
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(split).to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise RequestError(f"--split {split}: {one_line(error)}") from error
    return [Piece(one.splitname, one.from_, one.to) for one in found if one.to > one.from_]


def _names(folder: Path) -> list[PurePosixPath]:
    """Relative paths of the files, in order, without hidden ones and those of Python's own folders."""
    found = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [
        PurePosixPath(name.as_posix())
        for name in found
        if not any(part.startswith((".", "__")) for part in name.parts)
    ]


def _without_what_is_about(names: Sequence[str]) -> list[str]:
    """Without README, LICENSE and metadata beside tables, and without what is no data at all."""
    data = [n for n in names if kind_of(Path(n)) or PurePosixPath(n).suffix.lower() in _CONTAINERS]
    beside = [n for n in data if not _ABOUT.fullmatch(PurePosixPath(n).name)]
    # A folder of texts: its README is one of them.
    return beside if {kind_of(Path(n)) for n in beside} - {"text"} else data


def _one_kind(files: Sequence[Path], dataset: str) -> str:
    kinds = {kind_of(file) for file in files}
    if not files:
        raise RequestError(f"DATASET {dataset}: no file of a known kind in it; give {UNDERSTOOD}")
    if None in kinds:
        unknown = next(file for file in files if kind_of(file) is None)
        raise RequestError(f"DATASET {unknown}: a file of an unknown kind; give {UNDERSTOOD}")
    if len(kinds) > 1:
        found = ", ".join(sorted({"".join(file.suffixes[-2:]) for file in files}))
        raise RequestError(f"DATASET {dataset}: found {found}; give files of one kind")
    return str(kinds.pop())


def _splits(names: Sequence[str], kind: str, dataset: str) -> dict[str, list[str]]:
    """By the rules of `datasets`: data/SPLIT-00000-of-00001.*, then names of folders, then names of files."""
    from datasets import data_files

    shard = re.compile(
        re.escape(data_files.SPLIT_PATTERN_SHARDED.partition("{")[0])
        + r"(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*"
    )
    sharded = {name: found["split"] for name in names if (found := shard.fullmatch(name))}
    ways: list[dict[str, list[str]]] = [
        {split: [n for n in names if sharded.get(n) == split] for split in _in_order(set(sharded.values()))}
    ]
    for patterns in (
        data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    ):
        ways.append({str(split): [n for n in names if _matches(n, each)] for split, each in patterns.items()})
    for way in ways:
        splits = {split: of_split for split, of_split in way.items() if of_split}
        left = sorted(set(names).difference(*splits.values()))
        if splits and not left:
            return splits
        if splits and kind != "text":
            raise RequestError(
                f"DATASET {dataset}: {left[0]} belongs to no split, while others are of {', '.join(splits)}; "
                "name it as they are named, or move it away"
            )
        if splits:
            break  # a folder of texts, one of which is called e.g. evaluation.md
    return {"train": list(names)}


def _in_order(splits: Collection[str]) -> list[str]:
    from datasets import data_files

    usual = [str(split) for split in data_files.DEFAULT_SPLITS if split in splits]
    return [*usual, *sorted(set(splits).difference(usual))]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    from fsspec.utils import glob_translate

    return any(re.fullmatch(glob_translate(pattern.removeprefix("./")), name) for pattern in patterns)


def _configurations(folder: Path, dataset: str) -> tuple[dict[str, dict[str, list[str]]], str | None]:
    """(configuration -> split -> patterns, the default one) of a data set card; empty without any."""
    card = folder / "README.md"
    if not card.is_file():
        return {}, None
    from datasets.data_files import sanitize_patterns

    try:
        text = read_limited(card, _CARD_BYTES).decode("utf-8", "replace")
        parts = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
        head = parse_yaml(parts[1], _CARD_BYTES, _CARD_NODES) if parts else {}
        listed: list[dict[str, Any]] = head.get("configs") or [] if isinstance(head, dict) else []
        listed = [one for one in listed if one.get("data_files")]
        # YAML reads some names as numbers.
        configs = {str(one["config_name"]): sanitize_patterns(one["data_files"]) for one in listed}
        marked = [str(one["config_name"]) for one in listed if one.get("default")]
    except Exception as error:  # whatever stands there was written by hand
        raise RequestError(f"DATASET {dataset}: its README.md: configs: {one_line(error)}") from error
    defaults = [*marked, *(name for name in configs if name == "default" or len(configs) == 1)]
    return configs, next(iter(defaults), None)


def _configuration(configs: Mapping[str, object], config: str | None, dataset: str) -> str:
    if config is None or config not in configs:
        asked = f" {config}" if config is not None else ""
        raise RequestError(f"--dataset-config{asked}: {dataset} has {', '.join(configs)}; name one of these")
    return config


def _no_configuration(dataset: str, config: str) -> RequestError:
    return RequestError(f"--dataset-config {config}: {dataset} has no configurations; leave the flag out")
