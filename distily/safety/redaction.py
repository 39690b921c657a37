"""Credentials, and the addresses of private services, out of what is written, shared or shown.

Command lines, requests and error messages may hold a token, a password or a signed URL. Whatever writes a
record of a run, a report, a card, a log or an error line passes it through here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

HIDDEN = "***"
# Parts of a name, split at dashes, underscores, dots and capitals, that make its value a secret.
_SECRET = frozenset(
    {
        *("secret", "password", "passwd", "passphrase", "pwd", "credential", "credentials"),
        *("signature", "sig", "apikey", "authorization", "bearer", "endpoint"),
    }
)
# As the last part only: `tokens` and `token_id` are numbers of ours.
_SECRET_AT_THE_END = frozenset({"token", "key"})
# As neighbours: AWS_ACCESS_KEY_ID, GoogleAccessId, Key-Pair-Id.
_SECRET_PAIRS = frozenset({("access", "key"), ("access", "id"), ("key", "pair"), ("private", "key")})
# Tokens of a vocabulary.
_VOCABULARY = frozenset({"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "next", "end"})
_PART = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
# A value of a variable that is shorter says nothing, and would be found everywhere.
_SHORTEST = 8

_USER = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(r"([?&;])([\w.%-]+)=([^\s&;#'\"<>]*)")
_ASSIGNED = re.compile(r"(?<![\w?&;.-])(-{0,2}[A-Za-z_][\w.-]*)(=)([^\s,;'\"<>)\]}]+)")
_FLAG = re.compile(r"(?<!\S)(--[A-Za-z][\w-]*)(\s+)(?!-)(\S+)")
_QUOTED = re.compile(r"""(["'])([\w.-]+)\1(\s*:\s*)(["'])((?:(?!\4).)*)\4""")
# What tokens of well-known services look like, wherever they stand.
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[opsu]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})\b"
    r"|(?<=Bearer )\S{8,}"
)


def redact(text: str) -> str:
    """`text` with `***` for each credential in it: the user and password of a URL, the values of a signed
    query string, and of flags, variables and fields whose name says that they are secret; tokens of
    well-known services anywhere.

    Example:
        >>> redact("https://me:word@host/x?X-Amz-Signature=ab12&part=1")
        'https://***@host/x?X-Amz-Signature=***&part=1'
    """
    if "://" in text:
        text = _USER.sub(rf"\1{HIDDEN}@", text)
        text = _QUERY.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN}" if is_secret(m[2]) else m[0], text)
    if "=" in text:
        text = _ASSIGNED.sub(lambda m: f"{m[1]}={HIDDEN}" if _is_named(m[1]) else m[0], text)
    if "--" in text:
        text = _FLAG.sub(lambda m: f"{m[1]}{m[2]}{HIDDEN}" if is_secret(m[1]) else m[0], text)
    if ":" in text:
        text = _QUOTED.sub(
            lambda m: f"{m[1]}{m[2]}{m[1]}{m[3]}{m[4]}{HIDDEN}{m[4]}" if is_secret(m[2]) else m[0], text
        )
    return _TOKEN.sub(HIDDEN, text)


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line for a record: `redact` of each word, and of a secret flag also the word that follows it;
    addresses and secrets that the environment holds are hidden too.

    Example:
        >>> redact_words(["distily-train", "--hub-token", "hf_x", "--lr=1"])
        ['distily-train', '--hub-token', '***', '--lr=1']
    """
    hidden, shown, hide = _of_the_environment(), [], False
    for word in words:
        flag, given, _ = word.partition("=")
        secret = flag.startswith("-") and is_secret(flag)
        shown.append(HIDDEN if hide else f"{flag}={HIDDEN}" if secret and given else _plain(word, hidden))
        hide = secret and not given
    return shown


def for_record(value: Any) -> Any:
    """A JSON value for a record that others may read: as `redact_words` in its lists of words, as `redact` in
    its texts, and `***` for what lies under a name that says that it is secret.
    """
    return _recorded(value, _of_the_environment())


def is_secret(name: str) -> bool:
    """Whether the name of a flag, a field, a parameter or a variable says that its value is a secret."""
    parts = [part.lower() for part in _PART.findall(name)]
    if parts[-1:] == ["token"] and parts[-2:-1] and parts[-2] in _VOCABULARY:
        return False
    return bool(parts) and (
        parts[-1] in _SECRET_AT_THE_END
        or not _SECRET.isdisjoint(parts)
        or any(pair in _SECRET_PAIRS for pair in pairwise(parts))
    )


def _is_named(name: str) -> bool:
    """The same in running text, where `key=` and `token=` alone are words of many languages."""
    return is_secret(name) and (
        name.startswith("-") or len(_PART.findall(name)) > 1 or name.lower() in _SECRET
    )


def _recorded(value: Any, hidden: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if type(one) is str and is_secret(str(name)) else _recorded(one, hidden)
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        if all(type(one) is str for one in value):
            return redact_words(value)
        return [_recorded(one, hidden) for one in value]
    return _plain(value, hidden) if type(value) is str else value  # no name of an enumeration


def _plain(text: str, hidden: Sequence[str]) -> str:
    for secret in hidden:
        text = text.replace(secret, HIDDEN)
    return redact(text)


def _of_the_environment() -> list[str]:
    """Values of variables that are secret or the address of a service, the longest first; no paths."""
    values = {
        value.strip()
        for name, value in os.environ.items()
        if len(value.strip()) >= _SHORTEST and not value.startswith("/") and is_secret(name)
    }
    return sorted(values, key=len, reverse=True)
