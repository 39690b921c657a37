"""JSON and YAML that somebody else may have written: read only where memory and stack are certain to hold.

A text of a few kilobytes can stand for gigabytes: a YAML alias of aliases of aliases, or JSON of nothing but
brackets, which takes thirty times its size as Python objects. Both are refused before they are built.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

# Bytes of a document. The longest are those of tokenizers, some tens of MiB.
MAX_JSON, MAX_YAML = 2**28, 2**20
# Of a file with an entry for each step of a training.
MAX_LOG = 2**30
# Levels of lists and objects in each other. Python's own limit of recursion is near a thousand.
MAX_DEPTH = 100
# Values that a YAML document stands for, with what its aliases repeat.
MAX_NODES = 20_000
# Parsed, a list or an object takes some 60 bytes. Those of a tokenizer hold a pair of tokens at least.
_BYTES_PER_CONTAINER, _SMALL = 8, 2**16
_OPENING, _CLOSING = b"[{", b"]}"


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a file that lies in a directory of somebody else.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or has more than `limit` bytes.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, {limit:,} are possible")
        return file.read(status.st_size)


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """`parse_json` of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, too deep, or no JSON; the message says which, without the name.
    """
    return parse_json(read_limited(path, limit), limit)


def parse_json(data: bytes, limit: int = MAX_JSON) -> Any:
    """The value that JSON in UTF-8 stands for.

    Args:
        data: the text, perhaps behind a byte order mark.
        limit: bytes that it may have.

    Raises:
        ValueError: it has more, is nested deeper than `MAX_DEPTH`, is all brackets, or is no JSON.
    """
    if len(data) > limit:
        raise ValueError(f"it has {len(data):,} bytes, {limit:,} are possible")
    containers = data.count(b"[") + data.count(b"{")
    if containers * _BYTES_PER_CONTAINER > len(data) + _SMALL:
        raise ValueError(f"{containers:,} lists and objects in {len(data):,} bytes were made to harm")
    try:
        value = json.loads(data.decode("utf-8-sig"))
        return _shallow(value) if containers > MAX_DEPTH else value
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None


def parse_yaml(text: str, limit: int = MAX_YAML, nodes: int = MAX_NODES) -> Any:
    """The plain data that a YAML document stands for.

    Args:
        text: the document.
        limit: characters that it may have.
        nodes: values that it may stand for, with what its aliases repeat.

    Raises:
        ValueError: it is no YAML, names anything but plain data, has a key twice, contains itself, is nested
            deeper than `MAX_DEPTH`, or is larger than the limits; the message is the reason.
    """
    import yaml

    if len(text) > limit:
        raise ValueError(f"it has {len(text):,} characters, {limit:,} are possible")
    try:
        _check_events(text, nodes)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, nodes, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _without_waiting(path: str, flags: int) -> int:
    """To open a pipe would be to wait until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _shallow(value: Any) -> Any:
    """`value`, unless it is nested too deep for those who walk it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, (list, dict))
            for inner in (one if isinstance(one, list) else one.values())
            if isinstance(inner, (list, dict))
        ]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_events(text: str, nodes: int) -> None:
    """ValueError for a document that is too deep or too long to be composed; nothing is built."""
    import yaml

    depth = count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if count > nodes:
            raise ValueError(f"it has more than {nodes:,} values")


def _count(node: yaml.Node, nodes: int, known: dict[int, int], open_nodes: set[int]) -> int:
    """Values that a node stands for, each time that it occurs. ValueError for too many, and for one that
    contains itself.
    """
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        raise ValueError("an alias in it names what contains it")
    open_nodes.add(id(node))
    inner = node.value if isinstance(node.value, list) else []
    parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
    total = 1 + sum(_count(part, nodes, known, open_nodes) for part in parts)
    if total > nodes:
        raise ValueError(f"it stands for more than {nodes:,} values: its aliases repeat each other")
    open_nodes.discard(id(node))
    known[id(node)] = total
    return total


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data only, and a key that occurs twice is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Hashable] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} occurs twice", node.start_mark
                    )
                seen |= {key} if isinstance(key, Hashable) else set()
            return super().construct_mapping(node, deep)

    return Loader
