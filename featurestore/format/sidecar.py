"""The teacher's sidecar: the few weights that turn stored hidden states into what a sparse head cannot give.

Each part is one safetensors file in `teacher/` that never changes: `head` (the LM head), `block<i>` (input
norm and Q, K, V projections of decoder block i, counted from 0, whose input is `hidden.L<i>`), and `klt4` and
`klt6` (the basis of `hidden.L<num_layers>`, featurestore.format.states.transform). Letters: V
vocabulary, D hidden size, H query heads, G key and value heads, d head size. Weights keep the bits that the
checkpoint has; what they mean is in a spec in the file's metadata:

    logits = softcap * tanh(z / softcap), z = logit_scale * (hidden.L<num_layers> @ weight.T + bias)
    n = hidden.L<i> / sqrt(mean(hidden.L<i>^2) + norm_eps) * input_norm.weight      (RMSNorm over D)
    Q = (n @ q.weight.T + q.bias).reshape(T, H, d), K and V alike with G heads      (before rope)
    with q_norm.weight: each head of Q, and with k_norm.weight of K, goes through RMSNorm over d

where an absent softcap, bias or norm leaves its step out. `hidden.L<num_layers>` lies behind the final norm.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from featurestore.errors import CorruptionError, FeatureStoreError, MissingFeatureError, StoreFormatError
from featurestore.format.codec import decode_hidden
from featurestore.format.directory import read_teacher_listing, teacher_listings
from featurestore.format.records import Stamp
from featurestore.format.schema import MAX_LAYER, MAX_VOCAB, TeacherIdentity
from featurestore.format.states.transform import (
    LEVELS,
    MAX_BITS,
    MAX_TRANSFORMED,
    MIN_SIZE,
    TRANSFORMED,
    Basis,
    basis_file,
    code_bits,
)
from featurestore.identity import canonical_json, check_int, digest, header, seal, unseal
from featurestore.storage.protocol import Root

Array = npt.NDArray[Any]

HEAD = "head"
PART_FILE = re.compile(
    rf"(head|block(?:0|[1-9][0-9]{{0,3}}))-[0-9a-f]{{32}}\.safetensors|({'|'.join(TRANSFORMED)})\.safetensors"
)
# safetensors' name of a type -> (ours, numpy's on this machine); numpy has no bf16, so its bits are kept.
DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "F32": ("f32", np.float32),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", np.uint16),
}
_SAFETENSORS = {ours: theirs for theirs, (ours, _) in DTYPES.items()}
_METADATA = "distily-cache"
_MAX_HEADER = 2**20
_MAX_NUMBER = 1e30


@dataclass(frozen=True, eq=False)
class Tensor:
    """A weight as the checkpoint holds it. dtype: f32, f16, or bf16, whose bits `values` has as uint16."""

    dtype: str
    values: Array

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The numbers, exactly."""
        if self.dtype == "bf16":
            return decode_hidden(self.values, None, "bf16")
        return self.values.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The LM head: `weight` [V, D], perhaps `bias` [V]; `norm.weight` [D] of the final norm, to refer to."""

    vocab_size: int
    hidden_size: int
    norm_eps: float
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size"):
            check_int(getattr(self, name), 1, MAX_VOCAB, f"sidecar: {name}")
        _check_number(self.norm_eps, "norm_eps", zero=True)
        _check_number(self.logit_scale, "logit_scale")
        _check_number(self.logit_softcap, "logit_softcap", optional=True)

    @property
    def part(self) -> str:
        return HEAD

    def fits(self, teacher: TeacherIdentity) -> bool:
        """Can this be a part of that teacher."""
        return (self.vocab_size, self.hidden_size) == (teacher.vocab_size, teacher.hidden_size)

    def required(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that every such part has."""
        return {"weight": (self.vocab_size, self.hidden_size), "norm.weight": (self.hidden_size,)}

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of those that it may have."""
        return {"bias": (self.vocab_size,)}


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """Input norm and projections of decoder block `layer`; `rope` to `window` are for attention maps.

    A map is softmax over keys of softcap * tanh(z / softcap), z = attention_scale * rotated Q . rotated K;
    query head h goes with key head h // (H / G), causal, and with a `window` over its last positions only.
    rope: the layer's entry of transformers' `rope_parameters`, None when nothing is rotated.
    """

    layer: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None = None
    window: int | None = None
    rope: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_int(self.layer, 0, MAX_LAYER, "sidecar: layer")
        for name in ("hidden_size", "heads", "kv_heads", "head_dim"):
            check_int(getattr(self, name), 1, MAX_VOCAB, f"sidecar: {name}")
        if self.heads % self.kv_heads:
            raise StoreFormatError(f"sidecar: {self.heads} heads cannot share {self.kv_heads} key heads")
        _check_number(self.norm_eps, "norm_eps", zero=True)
        _check_number(self.attention_scale, "attention_scale")
        _check_number(self.attention_softcap, "attention_softcap", optional=True)
        if self.window is not None:
            check_int(self.window, 1, MAX_VOCAB, "sidecar: window")
        if self.rope is not None and not isinstance(self.rope, dict):
            raise StoreFormatError("sidecar: rope must be an object")

    @property
    def part(self) -> str:
        return block_part(self.layer)

    def fits(self, teacher: TeacherIdentity) -> bool:
        """Can this be a part of that teacher."""
        return self.layer < teacher.num_layers and self.hidden_size == teacher.hidden_size

    def required(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that every such part has."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_norm.weight": (self.hidden_size,),
            "q.weight": (wide, self.hidden_size),
            "k.weight": (narrow, self.hidden_size),
            "v.weight": (narrow, self.hidden_size),
        }

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of those that it may have."""
        wide, narrow, norm = (self.heads * self.head_dim,), (self.kv_heads * self.head_dim,), (self.head_dim,)
        return {
            "q.bias": wide,
            "k.bias": narrow,
            "v.bias": narrow,
            "q_norm.weight": norm,
            "k_norm.weight": norm,
        }


@dataclass(frozen=True, kw_only=True)
class BasisSpec:
    """The basis of final states stored as `dtype`; counts: see `Basis`."""

    dtype: str
    hidden_size: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in TRANSFORMED:
            raise StoreFormatError(f"sidecar: a basis of {str(self.dtype)[:80]!r}")
        check_int(self.hidden_size, MIN_SIZE, MAX_TRANSFORMED, "sidecar: hidden_size")
        if not isinstance(self.counts, list | tuple) or len(self.counts) != MAX_BITS:
            raise StoreFormatError(f"sidecar: counts are {MAX_BITS} numbers")
        for count in self.counts:
            check_int(count, 0, self.hidden_size, "sidecar: counts")
        object.__setattr__(self, "counts", tuple(self.counts))
        bits = sum(bits * count for bits, count in zip(range(MAX_BITS, 0, -1), self.counts, strict=True))
        if bits != code_bits(self.dtype, self.hidden_size) or sum(self.counts) > self.hidden_size:
            raise StoreFormatError("sidecar: the codes of the basis do not fill a row")

    @property
    def part(self) -> str:
        return self.dtype

    def fits(self, teacher: TeacherIdentity) -> bool:
        """Can this be a part of that teacher."""
        return self.hidden_size == teacher.hidden_size

    def required(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that every such part has."""
        rank = sum(self.counts)
        return {
            "mean": (self.hidden_size,),
            "encode": (self.hidden_size, rank),
            "decode": (rank, self.hidden_size),
            "levels": (LEVELS,),
        }

    def optional(self) -> dict[str, tuple[int, ...]]:
        """There are none."""
        return {}


PartSpec = HeadSpec | BlockSpec | BasisSpec
Spec = TypeVar("Spec", HeadSpec, BlockSpec, BasisSpec)


_KINDS: dict[object, type[HeadSpec] | type[BlockSpec] | type[BasisSpec]] = {
    "head": HeadSpec,
    "block": BlockSpec,
    "basis": BasisSpec,
}


@dataclass(frozen=True, eq=False)
class Part(Generic[Spec]):
    """One part: what its weights mean, and the weights by name (read-only views of the mapped file)."""

    spec: Spec
    tensors: Mapping[str, Tensor]


def block_part(layer: int) -> str:
    """The name of a decoder block's part."""
    return f"block{layer}"


def part_of(name: str) -> str | None:
    """The part that a file in `teacher/` holds, None when it is another file."""
    found = PART_FILE.fullmatch(name)
    return (found[1] or found[2]) if found else None


def part_file(spec: PartSpec, tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """Name and content of a part's file. ValueError unless the tensors are those that the spec asks for."""
    _check_names(spec, tensors, spec.part)
    # Wide types first: each tensor then starts at a multiple of its own item size, as readers expect.
    order = sorted(tensors, key=lambda name: (-tensors[name].values.itemsize, name))
    entries = _layout(spec, {name: _SAFETENSORS[tensors[name].dtype] for name in order})
    for name in order:
        if list(tensors[name].values.shape) != entries[name]["shape"]:
            raise ValueError(f"{name} is {tensors[name].values.shape}, not {entries[name]['shape']}")
    kind = next(name for name, made in _KINDS.items() if isinstance(spec, made))
    sealed = seal({**header("sidecar"), "kind": kind, "spec": asdict(spec)}).decode("ascii")
    head = canonical_json({"__metadata__": {_METADATA: sealed}, **entries})
    head += b" " * (-len(head) % 8)
    arrays = [tensors[name].values for name in order]
    body = [array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays]
    data = b"".join([len(head).to_bytes(8, "little"), head, *body])
    if isinstance(spec, BasisSpec):
        return basis_file(spec.dtype), data
    return f"{spec.part}-{digest(data)}.safetensors", data


def read_part(path: Path, where: str, name: str, identity: TeacherIdentity) -> Part[Any]:
    """Map a part's file, `name` in `teacher/`. StoreFormatError or CorruptionError, naming `where`, for
    anything that `part_file` cannot have written for this teacher; its hash is checked by who calls.
    """
    try:
        with path.open("rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CorruptionError(f"{where}: cannot be read: {error}") from None
    length = int.from_bytes(raw[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER, len(raw) - 8):
        raise CorruptionError(f"{where}: no safetensors header; the file is damaged")
    try:
        found = json.loads(raw[8 : 8 + length])
        sealed = found.pop("__metadata__")[_METADATA]
        types = {key: str(entry["dtype"]) for key, entry in found.items()}
        data = sealed.encode("ascii")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise StoreFormatError(f"{where}: its header is not that of a sidecar") from None
    spec = _spec_from_json(unseal(data, where, "sidecar"), where)
    if part_of(name) != spec.part or not spec.fits(identity):
        raise StoreFormatError(f"{where}: made for another part or teacher")
    try:
        _check_names(spec, types, where)
        # In the order of the file, which the offsets have to confirm.
        order = sorted(types, key=lambda key: (-np.dtype(DTYPES[types[key]][1]).itemsize, key))
        entries = _layout(spec, {key: types[key] for key in order})
    except (KeyError, ValueError) as error:
        raise StoreFormatError(f"{where}: unknown tensors or types: {error}") from None
    end = max(entry["data_offsets"][1] for entry in entries.values())
    if entries != found or end != len(raw) - 8 - length:
        raise StoreFormatError(f"{where}: shapes or offsets are not those of its spec")
    tensors = {}
    for key, entry in entries.items():
        ours, stored = DTYPES[entry["dtype"]]
        little = np.dtype(stored).newbyteorder("<")
        view = np.ndarray(entry["shape"], little, raw, 8 + length + entry["data_offsets"][0])
        tensors[key] = Tensor(ours, view)
    return Part(spec, tensors)


def sidecar_files(root: Root, listings: Iterable[str]) -> dict[str, tuple[str, Stamp]]:
    """Part -> (file in `teacher/`, its stamp), as the listings say; of two files either will do."""
    found: dict[str, tuple[str, Stamp]] = {}
    for listing in listings:
        for name, stamp in sorted(read_teacher_listing(root, listing).items()):
            if part := part_of(name):
                found.setdefault(part, (name, stamp))
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def load_basis(root: Root, dtype: str, identity: TeacherIdentity) -> Basis:
    """The basis of the final states that a store has as `dtype`.

    Raises:
        MissingFeatureError: it lists none.
        CorruptionError, StoreFormatError: its file is missing, damaged or foreign.
    """
    files = sidecar_files(root, teacher_listings(root))
    if dtype not in files:
        raise MissingFeatureError(
            f"{root.location}: teacher/{basis_file(dtype)} is not listed, in whose basis the final states "
            "are stored; copy the whole store again from where it comes from"
        )
    place: Any = root
    return _read_basis(place, *files[dtype], identity)


@lru_cache(maxsize=4)
def _read_basis(root: Any, name: str, stamp: Stamp, identity: TeacherIdentity) -> Basis:
    part: Part[BasisSpec] = checked_part(root, name, stamp, identity)
    values = {key: tensor.to_float32() for key, tensor in part.tensors.items()}
    whole = digest(root.local(f"teacher/{name}").read_bytes())
    return Basis(dtype=part.spec.dtype, counts=part.spec.counts, digest=whole, **values)


class Sidecar:
    """The parts that one manifest lists. A part is checked against its stamp before its first use.

    Raises MissingFeatureError, naming the generate flag that adds it, for a part that is not listed, and
    CorruptionError or StoreFormatError for one that is damaged or foreign.
    """

    def __init__(self, root: Root, identity: TeacherIdentity, listings: Iterable[str]) -> None:
        self._root, self._identity = root, identity
        self._files = sidecar_files(root, listings)
        self._parts: dict[str, Part[Any]] = {}

    @property
    def parts(self) -> list[str]:
        """The names of the parts: "head", "block3", ..."""
        return list(self._files)

    def head(self) -> Part[HeadSpec]:
        """The LM head."""
        return self._part(HEAD, "--final")

    def block(self, layer: int) -> Part[BlockSpec]:
        """Input norm and projections of the decoder block whose input is `hidden.L<layer>`."""
        return self._part(block_part(layer), f"--relation-layers {layer}")

    def _part(self, part: str, flag: str) -> Part[Any]:
        if part not in self._files:
            raise MissingFeatureError(
                f"{self._root.location}: no {part} in the teacher's sidecar of this cache (it has: "
                f"{', '.join(self.parts) or 'nothing'}); add it with `distily-cache generate ... {flag}`"
            )
        if part not in self._parts:
            name, stamp = self._files[part]
            self._parts[part] = checked_part(self._root, name, stamp, self._identity)
        return self._parts[part]


def checked_part(root: Root, name: str, stamp: Stamp, identity: TeacherIdentity) -> Part[Any]:
    """A part whose bytes are those that its listing stamps."""
    place = f"teacher/{name}"
    root.check({place: stamp})
    return read_part(root.local(place), root.where(place), name, identity)


def _spec_from_json(value: Mapping[str, Any], where: str) -> PartSpec:
    kind, given = _KINDS.get(value.get("kind")), value.get("spec")
    if kind is None or not isinstance(given, dict):
        raise StoreFormatError(f"{where}: unknown kind of sidecar: {str(value.get('kind'))[:80]!r}")
    names = {field.name for field in fields(kind)}
    try:
        return kind(**{name: given[name] for name in names})
    except KeyError as error:
        raise StoreFormatError(f"{where}: its spec lacks {error}") from None
    except FeatureStoreError as error:
        raise StoreFormatError(f"{where}: {error}") from None


def _check_names(spec: PartSpec, given: Iterable[str], where: str) -> None:
    required, names = set(spec.required()), set(given)
    if not required <= names <= required | set(spec.optional()):
        raise ValueError(f"{where} has the tensors {', '.join(sorted(names))[:200]}")


def _layout(spec: PartSpec, types: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """safetensors' entries of the tensors, one after the other in this order."""
    shapes = spec.required() | spec.optional()
    entries, start = {}, 0
    for name, dtype in types.items():
        end = start + math.prod(shapes[name]) * np.dtype(DTYPES[dtype][1]).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    return entries


def _check_number(value: object, name: str, zero: bool = False, optional: bool = False) -> None:
    if optional and value is None:
        return
    sound = isinstance(value, int | float) and 0 <= value <= _MAX_NUMBER and (zero or value > 0)
    if not sound or isinstance(value, bool):
        raise StoreFormatError(f"sidecar: {name} must be a positive number, not {str(value)[:80]}")
