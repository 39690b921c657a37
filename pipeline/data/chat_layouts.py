"""The ways in which data sets write down conversations, and what each is as a list of messages.

Messages: a column of lists of {role, content}. ShareGPT: a column `conversations` of lists of {from, value}.
Alpaca: columns `instruction`, `output`, and maybe `input`, `system` and `history`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_COLUMN, MESSAGES_COLUMN, CONVERSATIONS_COLUMN = "text", "messages", "conversations"
ALPACA_COLUMNS = ("instruction", "output")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def as_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of ShareGPT with the names of a chat template; any other as it is.

    A speaker that ShareGPT has no role for (a tool, an observation) keeps its name; the template decides.
    """
    if "from" not in message or message.get("role") is not None:
        return message
    speaker = message["from"]
    role = _ROLES.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message.get("value")} | (
        {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    )


def alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row: the instruction, with the input below it, is asked, the output answers."""
    asked = row.get("instruction")
    if row.get("input") and isinstance(asked, str) and isinstance(row["input"], str):
        asked = f"{asked}\n\n{row['input']}"
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [
        *messages,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": row.get("output")},
    ]
