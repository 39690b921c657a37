"""The spellings of flags that `distily-train` takes too: underscores, and switches that say True or False.

And flags that may stand without their value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.request.flags import flags_of, name_of
from pipeline.request.generate import GenerateRequest

_VALUES = {"true": True, "false": False}


def spelled(arguments: Sequence[str], command: Any) -> list[str]:
    """`arguments` in the one spelling that `command`, a click group, knows: `--load_it False` vanishes.

    What follows a bare `--` is left alone.
    """
    switches = _switches(command)
    alone = {name_of(name): flag.alone for name, flag in flags_of(GenerateRequest).items() if flag.alone}
    result: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in alone and not equals and (not rest or rest[0].startswith("-")):
            equals, value = "=", alone[name]
        if name not in switches:
            result.append(name + equals + value)
            continue
        if not equals and rest and rest[0].lower() in _VALUES:
            value = rest.pop(0)
        wanted = _VALUES.get(value.lower(), True) if value else True
        result += [name] if wanted else switches[name]
    return result


def _switches(command: Any) -> dict[str, list[str]]:
    """Every flag without a value, and what says the opposite of it: nothing, where it has no `--no-...`."""
    options = [option for sub in command.commands.values() for option in sub.params]
    return {
        name: list(option.secondary_opts)
        for option in options
        if getattr(option, "is_flag", False)
        for name in option.opts
    }
