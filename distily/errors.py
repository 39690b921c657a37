"""The root of all exceptions that distily-cache raises on purpose, and those of the ground that both stages
share. Each is also the builtin that callers expect.
"""


class DistilyError(Exception):
    """Anything that distily-cache raises on purpose; the message is one line.

    Example:
        try:
            reader = CacheReader.open("run/cache")
        except DistilyError as error:
            sys.exit(str(error))
    """


class CheckpointError(DistilyError, ValueError):
    """The files of a model checkpoint are incomplete or damaged."""


class DataFileError(DistilyError, ValueError):
    """A data file cannot be read as its name says; the message is the reason, without the name."""


class HubError(DistilyError, OSError):
    """The Hugging Face hub cannot be reached, or refuses us."""


class PluginError(DistilyError, RuntimeError):
    """An extension of another package failed; see `distily.plugins`."""
