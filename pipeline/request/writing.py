"""What a request says of texts that are to be written, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RequestError
from pipeline.request.flags import check_flags, flag, flags_of, name_of

# vLLM samples at no higher one.
MAX_TEMPERATURE = 2.0
PROMPT_TOKENS = 64
# Heading of `--help`.
_WRITING = "Texts that the teacher or a student writes first"


@dataclass(frozen=True, kw_only=True)
class WritingRequest:
    """The flags that go with --continuations, one for each field.

    continuations: how many of each prompt. from_student: the checkpoint that writes; None: the teacher.
    prompt_tokens: where a text is cut; None: at PROMPT_TOKENS. Chats are not cut.
    """

    continuations: int = field(
        metadata=flag(
            "Let the teacher continue each text N times, cut to --prompt-tokens, or with each chat before "
            "the assistant's last turn; the samples are then what it writes, and that alone is learned.",
            _WRITING,
            metavar="N",
            least=1,
        )
    )
    from_student: str | None = field(
        default=None,
        metadata=flag(
            "Let this student write instead (checkpoint directory or hub name), and the teacher score it.",
            _WRITING,
            metavar="CKPT",
        ),
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata=flag(
            f"Tokens of a text to continue from. (default: {PROMPT_TOKENS})",
            _WRITING,
            least=1,
        ),
    )
    continuation_temperature: float = field(
        default=1.0,
        metadata=flag(
            "Temperature to sample at, up to 2; 0 takes the most probable token. (default: 1)", _WRITING
        ),
    )
    continuation_top_p: float = field(
        default=1.0,
        metadata=flag(
            "Sample from the most probable tokens that together have this probability. (default: 1)",
            _WRITING,
        ),
    )
    continuation_max_tokens: int = field(
        default=128,
        metadata=flag(
            "Longest text; it ends earlier where the writer ends it. (default: 128)", _WRITING, least=1
        ),
    )

    def __post_init__(self) -> None:
        check_flags(self)
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


def writing_request(flags: Mapping[str, Any]) -> WritingRequest | None:
    """The request that the command's flags make, those that are None being not given; None without any.

    Raises:
        RequestError: a value out of range, or flags that mean nothing without --continuations.
    """
    given = {name: flags[name] for name in flags_of(WritingRequest) if flags.get(name) is not None}
    if given and "continuations" not in given:
        raise RequestError(
            f"{name_of(next(iter(given)))}: has no effect without --continuations; add --continuations N, "
            "or leave it out"
        )
    return WritingRequest(**given) if given else None
