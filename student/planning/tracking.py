"""Counts the bytes of tensors while code runs on them, by what they are, and the FLOPs of its products.

The tensors may be fake ones (torch's FakeTensorMode), which have shapes and no memory: then real code is
followed without its cost.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry


@dataclass
class Moment:
    """The fullest moment of a part of a step: bytes by label."""

    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of all labels."""
        return sum(self.bytes.values())


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active every new storage counts, under a label, until it is freed.

    label: of storages made from now on. segment: of `moments`, to which the fullest moment from now on
    belongs. on_gpu: whether the code is followed for a GPU, whose kernels convert numbers as they read them;
    those of a CPU make converted copies first, see `converted_bytes`.
    """

    def __init__(self, label: str, segment: str, on_gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label, self.segment, self._on_gpu = label, segment, on_gpu
        self.moments: dict[str, Moment] = {}
        self.flops = 0
        self._live: dict[int, tuple[str, int]] = {}
        self._bytes: Counter[str] = Counter()
        self._total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self.call(func, args, kwargs or {})
        self._count_flops(func, args, kwargs or {}, out)
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.add(made)
        if not self._on_gpu and (size := converted_bytes(func, args, kwargs or {})):
            self._change(self.label, size)
            self._change(self.label, -size)
        return out

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the code asks for."""
        return func(*args, **kwargs)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = (self.label, storage.nbytes())
        self._change(self.label, storage.nbytes())
        weakref.finalize(storage, self._free, key)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """What is there before and counts elsewhere; operations return views of it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = ("", 0)
            weakref.finalize(storage, self._live.pop, storage._cdata, None)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a storage under another label from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            before, size = self._live[key]
            if not size:
                return
            self._live[key] = (label, size)
            self._bytes[before] -= size
            self._bytes[label] += size

    @contextmanager
    def under(self, label: str) -> Iterator[None]:
        """Label what is made inside."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _free(self, key: int) -> None:
        label, size = self._live.pop(key)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self._bytes[label] += size
        self._total += size
        moment = self.moments.setdefault(self.segment, Moment())
        if self._total > moment.total:
            moment.bytes = dict(self._bytes)

    def _count_flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func is torch.ops.aten._int_mm.default:
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            self.flops += 2 * rows * inner * columns
            return
        # The registry knows addmm, and not addmm_.
        product = getattr(torch.ops.aten, func._overloadpacket.__name__.removesuffix("_"), None)
        if product in flop_registry:
            self.flops += flop_registry[product](*args, **kwargs, out_val=out)


def converted_bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of copies that an elementwise operation on a CPU makes, while it runs, of operands that are not of the
    type that all are promoted to (at::TensorIterator). No dispatch mode sees them.
    """
    if torch.Tag.pointwise not in func.tags or func._overloadpacket is torch.ops.aten.where:
        return 0
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()]
    types = {one.dtype for one in given}
    if len(types) < 2:
        return 0
    common = reduce(torch.promote_types, types)
    return sum(one.numel() * common.itemsize for one in given if one.dtype != common)


class FakeTracker(Tracker):  # type: ignore[no-untyped-call]
    """Follows code on fake tensors and a few real ones: operations among real tensors are real, so that code
    may ask for their values (which positions are learned); with a fake one among them they are fake.

    summed: shape of a weight that is used twice, once the backward pass has begun. Autograd adds up the two
    gradients in place, but not where one is of a subclass of Tensor, as fake ones are.
    """

    summed: torch.Size | None = None

    def __init__(self, label: str, segment: str, on_gpu: bool, fake: FakeTensorMode) -> None:
        super().__init__(label, segment, on_gpu)
        self._fake = fake

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Real where all of its tensors are, and for indices made of nothing; else fake."""
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        faked = [isinstance(one, FakeTensor) for one in given]
        if (given and not any(faked)) or func is torch.ops.aten.arange.default:
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor and self._of_summed(args):
            func = torch.ops.aten.add_.Tensor
        if not all(faked):
            args, kwargs = tree_map(self._faked, (args, kwargs))
        with self._fake:
            return func(*args, **kwargs)

    def _of_summed(self, args: tuple[Any, ...]) -> bool:
        return self.summed is not None and all(
            isinstance(one, Tensor) and one.shape == self.summed for one in args
        )

    def _faked(self, one: Any) -> Any:
        if isinstance(one, Tensor) and not isinstance(one, FakeTensor):
            return self._fake.from_tensor(one)
        return one
