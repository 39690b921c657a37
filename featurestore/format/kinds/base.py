"""What the store asks of a kind of column group; `table` finds the one object that answers for a spec.

R rows (positions of all samples of a task), T positions of a sample, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy.typing as npt

from featurestore.format.arrays import ChunkCache
from featurestore.format.columns import ArrayLayout, Extent, Stats
from featurestore.format.schema import Sample, TeacherIdentity
from featurestore.format.states.transform import Basis

Array = npt.NDArray[Any]

Spec = TypeVar("Spec")
Features = TypeVar("Features")
Codes = TypeVar("Codes")

# (position of a sample in its task, its first row, the row behind its last one) -> what is stored of it
ReadSample = Callable[[int, int, int], Codes]


class GroupKind(ABC, Generic[Spec, Features, Codes]):
    """One kind of column group: its arrays, how features get into them and out, and what is said about them.

    Spec says what a group holds, Features are the numbers of one sample, Codes the same as stored (for most
    kinds the Features themselves).

    Attributes:
        name: the `kind` of its specs in JSON.
        ids: a regular expression for the `kind` of its specs, with which the ids of its groups begin.
        spec: the class of its specs.
        stats: what a commit record adds up over the rows (see docs/FORMAT.md).
    """

    name: ClassVar[str]
    ids: ClassVar[str]
    spec: type[Spec]
    stats: ClassVar[tuple[str, ...]] = ()

    def stat_names(self, spec: Spec) -> list[str]:
        """What the commit record of a group has in `stats`, in order of names."""
        return sorted(self.stats)

    def least_stats(self, spec: Spec) -> int:
        """How many of `stat_names`, the first ones, a commit record has that does not have all."""
        return len(self.stat_names(spec))

    # Requests: which group serves which, and how a user asks for one.

    def covers(self, have: Spec, want: Spec) -> bool:
        """Whether a cache of `have` serves a request for `want`."""
        return have == want

    def parts(self, have: Sequence[Spec], want: Spec) -> list[Spec]:
        """The parts of `want`, each of which one of `have` covers, that are all of it; none where there are
        no such parts.
        """
        return [want] if any(self.covers(one, want) for one in have) else []

    def rest(self, have: Sequence[Spec], want: Spec) -> Spec | None:
        """The group that serves `want` together with groups of `have`; None where these do."""
        return None if self.parts(have, want) else want

    def ways(self, have: Sequence[Spec], want: Spec) -> list[list[Spec]]:
        """Ways to cut `want` into parts: a store that has groups of `have` serves it where, of one of these
        ways, a group of each task covers each part.
        """
        return [[want]]

    def offered(self, spec: Spec) -> Spec:
        """What a group is there for: it alone, or with those that it was added to."""
        return spec

    def width(self, spec: Spec) -> tuple[float, ...]:
        """Orders the specs that have the same `kind` by how much they tell."""
        return ()

    @abstractmethod
    def flag(self, kind: str) -> str | None:
        """The flag of `distily-cache generate` that adds a group called `kind`; None if it is not ours."""

    # Writing.

    def keep(self, spec: Spec, features: Features, sample: Sample) -> Features:
        """What a group stores of the features of a sample, as they are captured at all its positions."""
        return features

    def check_teacher(self, spec: Spec, identity: TeacherIdentity) -> None:
        """ValueError if this teacher cannot have such features."""
        return

    @abstractmethod
    def check(self, spec: Spec, one: Any, length: int, identity: TeacherIdentity) -> None:
        """ValueError unless `one` is the Features of a sample of `length` positions, as documented."""

    @abstractmethod
    def layouts(self, spec: Spec, extent: Extent) -> dict[str, ArrayLayout]:
        """The arrays of a group with their shapes, dtypes and chunks."""

    @abstractmethod
    def pack(
        self, spec: Spec, features: Sequence[Features], identity: TeacherIdentity
    ) -> tuple[dict[str, Array], Stats]:
        """Join the checked features of a task's samples, in order, into the arrays of the group."""

    # Reading.

    def check_stats(self, spec: Spec, stats: Stats, rows: int, where: str) -> None:
        """StoreFormatError for stats that a group of `rows` rows cannot have; all names are there."""
        return

    def basis(self, spec: Spec) -> str | None:
        """The type whose basis `open` needs; None for groups that need none."""
        return None

    @abstractmethod
    def open(
        self,
        spec: Spec,
        directory: Path,
        extent: Extent,
        cache: ChunkCache | None,
        basis: Basis | None = None,
    ) -> ReadSample[Codes]:
        """What reads samples from the arrays in `directory`; unpacked chunks go to `cache`. basis: of the
        store, for groups that need one.

        CorruptionError or StoreFormatError for arrays that are damaged or not of the group, also while
        samples are read.
        """

    @abstractmethod
    def decode(self, codes: Codes) -> Features:
        """The features of a sample from what is stored of it."""

    def cut(
        self,
        codes: Codes,
        have: Spec,
        want: Spec,
        sample: Sample,
        identity: TeacherIdentity,
    ) -> Codes:
        """What serves `want`, made of the codes of `sample` in a group of `have`, which covers it."""
        return codes

    def join(self, parts: Sequence[Codes], want: Spec) -> Codes:
        """The codes of `want` of a sample from those of its `parts`, in their order."""
        (one,) = parts
        return one

    # What is told and exported.

    def measures(self, spec: Spec, stats: Stats, rows: int) -> dict[str, float | None]:
        """The fields of `GroupInfo` that follow from the sums of the stats over `rows` rows."""
        return {}

    @abstractmethod
    def row_bytes(self, spec: Spec, hidden_size: int) -> float:
        """About how many bytes one position takes on disk."""

    @abstractmethod
    def export_row_bytes(self, spec: Spec, hidden_size: int) -> int:
        """How many bytes one position takes in an export, uncompressed, at most."""

    @abstractmethod
    def export_fields(self, spec: Spec) -> list[tuple[str, Any]]:
        """Name and Arrow type of each column of an export; a row is a sample, so that each is a list."""

    @abstractmethod
    def export_columns(
        self, spec: Spec, features: Sequence[Features], lengths: Sequence[int]
    ) -> dict[str, Any]:
        """Arrow arrays by column, of all positions of these samples one after the other: [R] each; lengths:
        positions of each sample.
        """
