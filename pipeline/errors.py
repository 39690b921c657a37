"""What can go wrong in stage 1. `RequestError` is the user's to fix (exit code 2), the rest is ours."""

from distily.errors import DistilyError


class PipelineError(DistilyError):
    """Base of every error raised by `pipeline`."""


class RequestError(PipelineError, ValueError):
    """The request cannot be served as it stands; the message is one line that names the flag and the fix."""


class EngineError(PipelineError, RuntimeError):
    """The teacher engine failed or returned something that cannot be right."""
