"""What can go wrong in stage 1. `RequestError` is the user's to mend (exit code 2), the rest is ours."""


class PipelineError(Exception):
    """Base of every error raised by `pipeline`."""


class RequestError(PipelineError, ValueError):
    """The request cannot be served as it stands; the message is one line that names the flag and the mend."""


class EngineError(PipelineError, RuntimeError):
    """The teacher engine failed or returned something that cannot be right."""


def one_line(what: BaseException | str, limit: int = 200) -> str:
    """What an error says, in one line of at most `limit` characters; its name where it says nothing."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
