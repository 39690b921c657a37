"""Random access by sample to what a manifest lists. Nothing outside the manifest is ever read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.bundle import Bundle
from featurestore.catalogue.catalogue import catalogue_of
from featurestore.catalogue.manifest import fullest_manifest, read_manifest
from featurestore.catalogue.views import Lengths, SampleIds
from featurestore.errors import CorruptionError, MissingFeatureError, StoreFormatError
from featurestore.format.arrays import ChunkCache
from featurestore.format.directory import manifest_digests, read_spec, read_teacher_listing
from featurestore.format.kinds.logits import narrowed
from featurestore.format.kinds.table import GroupCodes, covers, flag_of, kind_of, ways, width
from featurestore.format.schema import GroupFeatures, GroupSpec, LogitsSpec
from featurestore.format.sidecar import Sidecar, load_basis, part_of
from featurestore.format.states.transform import Basis
from featurestore.storage.files import regular_size
from featurestore.storage.protocol import Root
from featurestore.storage.root import root_of

OPEN_BUNDLES = 128
FIX = "run the same `distily-cache generate` again to complete it"


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedSample:
    """One sample and its features. tokens: int32 [T]; loss_mask: bool [T]; features by the spec asked for;
    documents: see `schema.Sample`.
    """

    id: str
    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    features: dict[GroupSpec, GroupFeatures]
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class CodedSample:
    """One sample and its features as stored, for decoding elsewhere. Otherwise as CachedSample."""

    id: str
    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    features: dict[GroupSpec, GroupCodes]
    documents: tuple[str, ...] = ()


class CacheReader:
    """The samples of one manifest, by index. Use `CacheReader.open`.

    Opening reads the manifest alone. Ids and lengths lie in files that are mapped when they are touched, so
    that processes share them. A reader can be forked, and pickling sends the place and the manifest's digest
    only. It is not for use by several threads at once, except for `warm`. Bundles are checked against their
    committed sizes and hashes when they are first read; damage raises CorruptionError, and is never returned.
    At most 256 MiB of unpacked chunks are kept.

    Attributes:
        path: where the store lies.
        manifest_digest: the manifest that is read, which repeats an experiment exactly.
        identity: the teacher, its tokenizer and its engine.
        groups: column group id -> spec.
        sample_ids: one id per sample, 32 hex digits: a sequence that reads what is asked for.
        lengths: tokens of each sample, likewise; `np.asarray(lengths)` is int64 [samples].
        shards: how many shards (tasks) hold the samples.

    Example:
        reader = CacheReader.open("run/cache")
        sample = reader.read(0)
        logits = sample.features[reader.find_logits()]
    """

    def __init__(self, root: Root, manifest_digest: str) -> None:
        self.path = root.location
        self.manifest_digest = manifest_digest
        self._root = root
        self.identity, spec_digest = read_spec(root)
        self.catalogue = catalogue_of(root, read_manifest(root, manifest_digest))
        if self.catalogue.spec != spec_digest:
            raise CorruptionError(
                f"{self.path}: SPEC.json is not the one that manifest {manifest_digest} was made for"
            )
        self.groups: dict[str, GroupSpec] = dict(self.catalogue.groups)
        self.sample_ids = SampleIds(self.catalogue)
        self.lengths = Lengths(self.catalogue)
        self.shards = int(self.catalogue.task_starts[-1])
        self._bundles: OrderedDict[int, Bundle] = OrderedDict()
        self._verified: set[tuple[str, str]] = set()
        self._cache = ChunkCache()
        self._default_groups: list[GroupSpec] | None = None

    @classmethod
    def open(cls, path: str | Path, manifest: str | None = None) -> CacheReader:
        """Open a store at a manifest.

        Args:
            path: a local directory, s3://bucket/prefix or gs://bucket/prefix.
            manifest: a digest, or an unambiguous start of one; None takes the fullest manifest.

        Raises:
            StoreNotFoundError: there is no store.
            StoreFormatError: it has no such manifest, or is of a version that is not known.
            StoreAccessError: the object store does not answer.

        Example:
            reader = CacheReader.open("s3://bucket/cache", manifest="3f2a")
        """
        root = root_of(path)
        read_spec(root)
        fullest = fullest_manifest(root)
        if fullest is None:
            raise StoreFormatError(f"the store {root.location} has no manifest yet: {FIX}")
        if manifest is None:
            return cls(root, fullest)
        digests = manifest_digests(root)
        matches = [d for d in digests if d.startswith(manifest)]
        if len(matches) != 1:
            raise StoreFormatError(
                f"{len(matches)} manifests of {root.location} start with {manifest!r}; "
                f"there are: {', '.join(digests)}"
            )
        return cls(root, matches[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._root, self.manifest_digest))

    def __len__(self) -> int:
        return len(self.catalogue)

    def documents(self) -> list[list[tuple[str, ...]]]:
        """The documents that each sample was cut from, as Python objects of all samples.

        Returns:
            One list per sample, in the order of `sample_ids`. It has an entry for each task that holds the
            sample (mostly one): the keys of its documents, () where the task does not know them.

        Raises:
            CorruptionError: what lists them is missing or damaged.
        """
        found: list[list[tuple[str, ...]]] = []
        for number in range(self.catalogue.segments):
            start, raw = self.catalogue.documents(number)
            keys = [bytes(key).hex() for key in raw]
            known = [tuple(keys[a:b]) for a, b in pairwise(start.tolist())]
            found += [[known[place]] for place in self.catalogue.segment(number).kept]
        for index, _, keys_of_copy in self.copies():
            found[index].append(keys_of_copy)
        return found

    def copies(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """The further tasks of samples that more than one task holds: index and id of the sample, and the
        keys of its documents there.
        """
        found: list[tuple[str, tuple[str, ...]]] = []
        for number in range(self.catalogue.segments):
            segment = self.catalogue.segment(number)
            start, raw = self.catalogue.documents(number) if len(segment.dropped) else ((), ())
            for place in segment.dropped.tolist():
                keys = tuple(bytes(key).hex() for key in raw[start[place] : start[place + 1]])
                found.append((bytes(segment.columns["sample"][place]).hex(), keys))
        ids = np.frombuffer(bytes.fromhex("".join(sample for sample, _ in found)), np.uint8).reshape(-1, 16)
        indices = self.catalogue.find(ids).tolist()
        return [(index, *one) for index, one in zip(indices, found, strict=True)]

    def knows_documents(self) -> bool:
        """Whether any sample names a document that it was cut from."""
        return any(len(self.catalogue.documents(number)[1]) for number in range(self.catalogue.segments))

    @property
    def teacher_dir(self) -> Path:
        """A local directory with the teacher's configuration and tokenizer files.

        Raises:
            CorruptionError: a file of an object store is missing or is not what was committed; of a local
                one, a link leads out of the store, or something is no file.
            StoreAccessError: the object store does not answer.
        """
        if self._root.keeps_copies:
            for listing in self.catalogue.teacher:
                stamps = read_teacher_listing(self._root, listing)
                small = {f"teacher/{name}": s for name, s in stamps.items() if part_of(name) is None}
                self._root.check(small)
        else:
            # Libraries read whatever lies there, and follow links.
            for name in self._root.names("teacher"):
                regular_size(self._root.local(f"teacher/{name}"))
        return self._root.local("teacher")

    def sidecar(self) -> Sidecar:
        """The teacher's LM head and projections, as far as the manifest lists them; nothing is read yet."""
        return Sidecar(self._root, self.identity, self.catalogue.teacher)

    def basis(self, dtype: str) -> Basis:
        """The basis of final states stored as klt4 or klt6; errors as those of `sidecar`."""
        return load_basis(self._root, dtype, self.identity)

    def shard(self, index: int) -> int:
        """The number of the shard that holds a sample; the samples of one share their files, and are best
        read one after the other.

        Raises:
            IndexError: there is no such sample.
        """
        return self.catalogue.shard(index)

    def find(self, kind: str) -> GroupSpec:
        """The widest spec of a kind that every sample has.

        Args:
            kind: "logits", "hidden.L20" or "lse.T2".

        Raises:
            MissingFeatureError: the message names what there is, and the generate flag that adds the kind.
        """
        candidates = [spec for spec in self.complete_groups() if spec.kind == kind]
        if candidates:
            return max(candidates, key=width)
        flag = flag_of(kind)
        partial = any(spec.kind == kind for spec in self.groups.values())
        there = ", ".join(sorted({spec.kind for spec in self.groups.values()})) or "no features"
        what = f"only some samples have {kind}" if partial else f"no {kind} in this cache (it has: {there})"
        fix = FIX if partial else f"add it with `distily-cache generate ... {flag}`"
        raise MissingFeatureError(f"{self.path}: {what}; {fix}")

    def find_logits(
        self, top_k: int | None = None, top_p: float | None = None, tail: int | None = None
    ) -> LogitsSpec:
        """The widest distribution that every sample has, cut to what is given.

        Args:
            top_k: at most so many tokens of each head.
            top_p: the smallest part of each head with this share of the mass.
            tail: the first so many draws from outside the head.

        Returns:
            A spec for `read`.

        Raises:
            MissingFeatureError: nothing covers it; the message names what there is, and the generate flags.

        Example:
            top = reader.find_logits(top_k=10)
            ids = reader.read(0, [top]).features[top].ids
        """
        widest = self.find("logits")
        assert isinstance(widest, LogitsSpec)
        held = [spec for spec in self.complete_groups() if isinstance(spec, LogitsSpec)] or [widest]
        for have in sorted(held, key=width, reverse=True):
            if (want := narrowed(have, top_k, top_p, tail)) is not None:
                return want
        given = {"--top-k": top_k, "--top-p": top_p, "--tail": tail}
        flags = " ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        there = "; ".join(map(_words, held))
        raise MissingFeatureError(
            f"{flags}: cannot be derived from {self.path}, which holds {there}; ask for a part of that, or "
            f"add it with `distily-cache generate ... {flags}`"
        )

    def complete_groups(self) -> list[GroupSpec]:
        """The specs that every sample has. What was extended by groups of further positions is one of them,
        in the place of its parts.
        """
        if self._default_groups is None:
            offered = dict.fromkeys(kind_of(spec).offered(spec) for spec in self.groups.values())
            complete = [spec for spec in offered if self._complete(spec)]
            joined = set(complete).difference(self.groups.values())
            self._default_groups = [
                spec for spec in complete if not any(covers(one, spec) for one in joined - {spec})
            ]
        return self._default_groups

    def read(self, index: int, groups: Sequence[GroupSpec] | None = None) -> CachedSample:
        """One sample with its features, decoded. Only the rows of this sample are read.

        Args:
            index: from 0 to `len(reader) - 1`.
            groups: the specs to read; one that a wider group covers is served from that. None takes every
                group that all samples have.

        Returns:
            Tokens int32 [T], loss mask bool [T], and the features by spec, which are `LogitsFeatures` with
            ragged heads, `LseFeatures` float32 [T], or hidden states [T, D].

        Raises:
            IndexError: there is no such sample.
            MissingFeatureError: no group of the store covers a spec.
            CorruptionError: the bytes are not those that were committed.

        Example:
            hidden = HiddenSpec(20, "bf16")
            states = reader.read(0, [hidden]).features[hidden].to_float32()
        """
        if groups is None:
            groups = self.complete_groups()
        bundle, position = self._place(index)
        sample = bundle.samples()[position]
        features = {spec: bundle.features(position, spec) for spec in groups}
        return CachedSample(
            id=self.sample_ids[index],
            tokens=sample.tokens,
            loss_mask=sample.loss_mask,
            features=features,
            documents=sample.documents,
        )

    def read_codes(self, index: int, groups: Sequence[GroupSpec]) -> CodedSample:
        """One sample with its features as stored, so that a whole batch can be decoded at once.

        Args:
            index: from 0 to `len(reader) - 1`.
            groups: the specs to read, as in `read`.

        Returns:
            What `read` gives, with `LogitsCodes` (integers as stored) in the place of `LogitsFeatures`.

        Raises:
            IndexError: there is no such sample.
            MissingFeatureError: no group of the store covers a spec.
            CorruptionError: the bytes are not those that were committed.
        """
        bundle, position = self._place(index)
        sample = bundle.samples()[position]
        features = {spec: bundle.codes(position, spec) for spec in groups}
        return CodedSample(
            id=self.sample_ids[index],
            tokens=sample.tokens,
            loss_mask=sample.loss_mask,
            features=features,
            documents=sample.documents,
        )

    def _place(self, index: int) -> tuple[Bundle, int]:
        number, place = self.catalogue.place(index)
        segment = self.catalogue.segment(number)
        row = segment.row_of(place)
        shard = int(self.catalogue.task_starts[number]) + row
        return self._bundle(shard), place - segment.span(row)[0]

    def warm(self, index: int, groups: Sequence[GroupSpec]) -> None:
        """Make the files of the shard that holds sample `index` available and verified; nothing is decoded.

        Safe in one thread while another reads: the reads that follow find the files at hand and trust them.

        Args:
            index: of the sample, from 0 to `len(reader) - 1`.
            groups: the specs that `read` will be asked for. One that no group serves is left to `read`, which
                raises an error for it.

        Raises:
            CorruptionError: a file is missing, or is not what was committed.
            StoreAccessError: the object store does not answer.
        """
        self._open(self.shard(index)).warm(groups)

    def _open(self, shard: int) -> Bundle:
        """A bundle of its own, with no data read yet."""
        number, row = self.catalogue.row(shard)
        return Bundle(
            root=self._root,
            identity=self.identity,
            task=self.catalogue.segment(number).task(row),
            records=self.catalogue.records(number, row),
            verified=self._verified,
            cache=self._cache,
        )

    def _bundle(self, t: int) -> Bundle:
        bundle = self._bundles.get(t)
        if bundle is None:
            bundle = self._bundles[t] = self._open(t)
            if len(self._bundles) > OPEN_BUNDLES:
                self._bundles.popitem(last=False)
        self._bundles.move_to_end(t)
        return bundle

    def _complete(self, want: GroupSpec) -> bool:
        return any(all(map(self._covered, way)) for way in ways(self.groups.values(), want))

    def _covered(self, want: GroupSpec) -> bool:
        return self.catalogue.covered({group for group, spec in self.groups.items() if covers(spec, want)})


def _words(spec: LogitsSpec) -> str:
    """`top-k 12, top-p 0.7 and 16 draws from outside that head`."""
    cut = "" if spec.top_p is None else f", top-p {spec.top_p:g}"
    return f"top-k {spec.top_k}{cut}" + (f" and {spec.tail} draws from outside that head" * bool(spec.tail))
