"""The exception tree of the training stage.

The command line maps `UserError` to exit code 2 (the request was wrong, one line says which flag and the
mend) and every other `StudentError` to exit code 1.
"""


class StudentError(Exception):
    """Root of everything that `student` raises on purpose."""


class UserError(StudentError, ValueError):
    """The request cannot be served as it was made; the message names the flag and the mend."""
