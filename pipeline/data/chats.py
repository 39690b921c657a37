"""Chats as text: a chat template writes a conversation, and we know which characters the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError

from distily.text import one_line
from pipeline.data.bad_rows import RowError
from pipeline.data.chat_layouts import as_message
from pipeline.errors import RequestError

Message = dict[str, str]
# Half-open ranges of characters, or of tokens.
Spans = list[tuple[int, int]]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What the assistant thought before it answered, where a data set keeps it beside the content.
REASONING = "reasoning_content"
# The day that Llama's templates name by default. Today's would give other samples on every day.
_TODAY = datetime(2024, 7, 26)


class ChatFormat:
    """A chat template and the special tokens of the tokenizer that it writes for.

    template: Jinja text; without it the tokenizer's own. flag: names the template in an error.

    Raises:
        RequestError: there is no template, or it cannot be parsed.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, flag: str = "--chat-template") -> None:
        if template is None:
            try:
                template = tokenizer.get_chat_template()
            except ValueError as error:
                raise RequestError(
                    "--chat-template: the teacher's tokenizer has no chat template; give one, a Jinja file"
                ) from error
        self._template, self._flag = str(template), flag
        self._marked = bool(_GENERATION.search(self._template))
        self._tokens = tokenizer.special_tokens_map
        self._end_of_turn = _end_of_turn(tokenizer)

    def text(self, messages: Sequence[Message], where: str) -> str:
        """The conversation as the template writes it.

        Raises:
            RowError: the template refuses it.
            RequestError: the template is no Jinja.
        """
        return self._render(messages, where, marked=False)[0]

    def text_and_spans(self, messages: Sequence[Message], where: str) -> tuple[str, Spans]:
        """The conversation, and the characters that the assistant has to produce, in order.

        Where the template has {% generation %} marks they decide; the assistant's text has to lie inside.
        Else a turn's span is the content as the template writes it (white space at its ends may be trimmed),
        all that stands between the prompt and the content where the template writes a reasoning, and
        the special token that ends the turn: the first one behind the content with nothing but white space
        between, when the template put it there and it is not the one that begins a text.

        Raises:
            RowError: the template refuses the conversation, or changes the assistant's text.
            RequestError: the template is no Jinja.
        """
        text, spans = self._render(messages, where, self._marked)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if self._marked:
            if not _holds("".join(text[start:end] for start, end in spans), said):
                raise RowError(
                    f"DATASET {where}: the assistant's text is not between the chat template's "
                    "{% generation %} marks; correct the row, give another --chat-template, or --loss-on all"
                )
            return text, spans
        found = self._locate(messages, text, where) if said else []
        if found is None:
            raise RowError(
                f"DATASET {where}: the chat template does not write the messages as they are, so it is not "
                "known what the assistant's text is; correct the row, give a --chat-template with "
                "{% generation %} marks, or --loss-on all"
            )
        return text, found

    def _locate(self, messages: Sequence[Message], text: str, where: str) -> Spans | None:
        """The assistant's spans in `text`; None when it is not template text and contents, in turn.

        The conversation is written a second time with a name in the place of each content. What lies between
        the names is the template's, so that the rest of `text` is known, character by character.
        """
        names = _names(messages)
        hollow = [dict(message) for message in messages]
        for name, (index, field) in names.items():
            hollow[index][field] = name
        parts = re.split(f"({'|'.join(names)})", self._render(hollow, where, marked=False)[0])
        if not text.startswith(parts[0]):
            return None
        at, spans, turns = len(parts[0]), [], []
        begun: dict[int, int] = {}
        for name, behind in zip(parts[1::2], parts[2::2], strict=True):
            index, field = names[name]
            written = _as_written(messages[index][field], behind, text, at)
            if written is None or (field == REASONING and index in turns):
                return None
            end = at + len(written)
            if field == REASONING:
                begun[index] = self._begin(messages, index, text, where, at)
            elif messages[index]["role"] == "assistant":
                stop = self._end_of_turn.match(behind)
                spans.append((begun.get(index, at), end + (stop.end() if stop else 0)))
                turns.append(index)
            at = end + len(behind)
        every = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return spans if at == len(text) and turns == every else None

    def _begin(self, messages: Sequence[Message], index: int, text: str, where: str, reasoning: int) -> int:
        """Where the assistant takes over in message `index`, whose reasoning is written at `reasoning`.

        That is behind the prompt for it. Some templates open the reasoning there, others leave this to the
        assistant.
        """
        before = messages[:index]
        prompt = self._render(before, where, marked=False, prompt=True)[0]
        none = prompt == self._render(before, where, marked=False)[0]
        if none or not text.startswith(prompt) or len(prompt) > reasoning:
            raise RowError(
                f"DATASET {where}: the chat template writes the reasoning_content of message {index}, and "
                "not what stands before it as a prompt, so it is not known where the assistant begins; give "
                "a --chat-template with {% generation %} marks, or --loss-on all"
            )
        return len(prompt)

    def _render(
        self, messages: Sequence[Message], where: str, marked: bool, prompt: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                strftime_now=_TODAY.strftime,
                **self._tokens,
            )
        except TemplateSyntaxError as error:
            raise RequestError(f"{self._flag}: line {error.lineno} is no Jinja: {error.message}") from error
        except Exception as error:  # a template may raise anything, also by what it does with the messages
            raise RowError(f"DATASET {where}: the chat template refuses it: {one_line(error)}") from error
        return texts[0], spans[0] if marked else []


def check_messages(value: Any, where: str, column: str) -> list[Message]:
    """The conversation in a row: role, content and reasoning_content of each message, nothing else is read.

    Raises:
        RowError: no list, a message without role or content, one of the fields is no text, tool calls.
    """
    place = f"--messages-column {column}: {where}"
    if not isinstance(value, list) or not value:
        raise RowError(f"{place} holds no list of messages, {{role, content}} each")
    checked: list[Message] = []
    for number, written in enumerate(value):
        if not isinstance(written, dict):
            raise RowError(f"{place}: message {number} is no object with role and content")
        message = as_message(written)
        if message.get("tool_calls"):
            raise RowError(f"{place}: message {number} calls tools, which is not supported; leave it out")
        for field in ("role", "content", REASONING):
            text = message.get(field)
            if not isinstance(text, str) and not (field == REASONING and text is None):
                what = "missing" if text is None else type(text).__name__
                raise RowError(f"{place}: message {number}: {field} has to be text, it is {what}")
        checked.append({"role": message["role"], "content": message["content"]})
        if message["role"] == "assistant" and message.get(REASONING):
            checked[-1][REASONING] = message[REASONING]
    return checked


def _end_of_turn(tokenizer: Any) -> re.Pattern[str]:
    """Matches white space and one special token, but not the token that begins a text."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    if tokenizer.bos_token != tokenizer.eos_token:
        special.discard(tokenizer.bos_token)
    names = sorted(map(re.escape, special), key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(names)})" if names else r"(?!)")


def _names(messages: Sequence[Message]) -> dict[str, tuple[int, str]]:
    """A word for each content and reasoning, none a part of any message or of another name, and which it is
    for: the number of the message, and the field.
    """
    mark = "zq"
    while any(mark in text for message in messages for text in message.values()):
        mark += "q"
    fields = [
        (index, field)
        for index, message in enumerate(messages)
        for field in (REASONING, "content")
        if field in message
    ]
    return {f"{mark}x{number}x{mark}": field for number, field in enumerate(fields)}


def _as_written(content: str, behind: str, text: str, at: int) -> str | None:
    """How `content` stands in `text` at `at`, followed by `behind`: as it is, or trimmed as templates do."""
    trimmed = (content, content.strip(), content.rstrip(), content.lstrip())
    for written in (*trimmed, content.strip("\n"), content.rstrip("\n"), content.lstrip("\n")):
        if text.startswith(written + behind, at):
            return written
    return None


def _holds(text: str, contents: Sequence[str]) -> bool:
    """Whether all contents, trimmed, stand in `text` one after the other."""
    at = 0
    for content in map(str.strip, contents):
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True
