"""The exceptions of the feature store: one tree, each also the builtin that callers expect."""

from distily.errors import CheckpointError, DistilyError, HubError


class FeatureStoreError(DistilyError):
    """Anything the feature store raises on purpose."""


class StoreNotFoundError(FeatureStoreError, FileNotFoundError):
    """There is no store at the path."""


class StoreFormatError(FeatureStoreError, ValueError):
    """The metadata is not ours, is of a future version, or is invalid."""


class SpecMismatchError(FeatureStoreError, ValueError):
    """The store belongs to another teacher, tokenizer or engine."""


class MissingFeatureError(FeatureStoreError, KeyError):
    """A column group is not in the cache."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote the whole message.
        return str(self.args[0]) if self.args else ""


class CorruptionError(FeatureStoreError, OSError):
    """The bytes on disk are not those that were committed."""


class StoreWriteError(FeatureStoreError, OSError):
    """The store cannot be written. Nothing that was committed is lost."""


class StoreAccessError(FeatureStoreError, OSError):
    """The object store cannot be reached, has no such bucket, or refuses us."""


# Exit code 2 of the command lines: the request names the wrong store, or one that cannot serve it.
BAD_REQUESTS = (
    CheckpointError,
    HubError,
    MissingFeatureError,
    SpecMismatchError,
    StoreAccessError,
    StoreFormatError,
    StoreNotFoundError,
)
