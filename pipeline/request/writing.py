"""What a request says of texts that are to be written, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import RequestError

# vLLM samples at no higher one.
MAX_TEMPERATURE = 2.0
PROMPT_TOKENS = 64
_OPTIONAL = ("prompt_tokens", "from_student")
_DEFAULTS: dict[str, Any] = {
    "continuation_temperature": 1.0,
    "continuation_top_p": 1.0,
    "continuation_max_tokens": 128,
}


@dataclass(frozen=True, kw_only=True)
class WritingRequest:
    """The flags that go with --continuations. Fields are named as the flags are.

    continuations: how many of each prompt. prompt_tokens: where a text is cut; None: at PROMPT_TOKENS. Chats
    are not cut. from_student: the checkpoint that writes; None: the teacher.
    """

    continuations: int
    prompt_tokens: int | None
    continuation_temperature: float
    continuation_top_p: float
    continuation_max_tokens: int
    from_student: str | None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--continuations", self.continuations),
            ("--prompt-tokens", self.prompt_tokens),
            ("--continuation-max-tokens", self.continuation_max_tokens),
        ):
            if value is not None and value < 1:
                raise RequestError(f"{flag} {value}: must be at least 1")
        if not 0.0 <= self.continuation_temperature <= MAX_TEMPERATURE:
            raise RequestError(
                f"--continuation-temperature {self.continuation_temperature}: a number from 0 to "
                f"{MAX_TEMPERATURE:g} is needed"
            )
        if not 0.0 < self.continuation_top_p <= 1.0:
            raise RequestError(
                f"--continuation-top-p {self.continuation_top_p}: a probability in (0, 1] is needed"
            )
        if self.continuation_temperature == 0 and self.continuations > 1:
            raise RequestError(
                f"--continuations {self.continuations}: at --continuation-temperature 0 all are the "
                "same; ask for 1, or give a temperature above 0"
            )

    def longest_prompt(self, max_seq_len: int, chats: bool) -> int:
        """Tokens of the longest prompt: of texts where they are cut, of chats what a continuation leaves.

        Raises:
            RequestError: a sample of `max_seq_len` does not hold both, or chats are to be cut.
        """
        texts = self.continuation_max_tokens
        if not chats:
            prompt = self.prompt_tokens or PROMPT_TOKENS
            if prompt + texts > max_seq_len:
                raise RequestError(
                    f"--prompt-tokens {prompt} and --continuation-max-tokens {texts} make {prompt + texts}, "
                    f"but a sample has at most {max_seq_len} tokens; lower one of them or raise --max-seq-len"
                )
            return prompt
        if self.prompt_tokens is not None:
            raise RequestError(
                f"--prompt-tokens {self.prompt_tokens}: a chat is not cut, its prompt is all that stands "
                "before the assistant's last turn; leave the flag out"
            )
        if texts >= max_seq_len:
            raise RequestError(
                f"--continuation-max-tokens {texts}: leaves nothing of a sample of {max_seq_len} tokens to "
                "the prompt; lower it or raise --max-seq-len"
            )
        return max_seq_len - texts


def writing_request(flags: dict[str, Any]) -> WritingRequest | None:
    """The request that the command's parameters make, None without --continuations.

    Raises:
        RequestError: a value out of range, or flags that mean nothing without --continuations.
    """
    given = {name: flags[name] for name in (*_DEFAULTS, *_OPTIONAL) if flags[name] is not None}
    if flags["continuations"] is None:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise RequestError(
                f"{flag}: has no effect without --continuations; add --continuations N, or leave it out"
            )
        return None
    return WritingRequest(
        **{"continuations": flags["continuations"], **dict.fromkeys(_OPTIONAL), **_DEFAULTS, **given}
    )
