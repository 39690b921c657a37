"""The exception tree of the training stage.

The command line maps `UserError` to exit code 2 (the request was wrong, one line says which flag and the
fix) and every other `StudentError` to exit code 1.
"""

from distily.errors import DistilyError
from featurestore.errors import BAD_REQUESTS


class StudentError(DistilyError):
    """Root of everything that `student` raises on purpose."""


class UserError(StudentError, ValueError):
    """The request cannot be served as it was made; the message names the flag and the fix."""


def exit_code(error: DistilyError) -> int:
    """With what a command ends: 2 where the request was wrong, else 1."""
    return 2 if isinstance(error, (UserError, *BAD_REQUESTS)) else 1
