"""Initial weights of a student that is narrower than its teacher: which of the teacher's channels it keeps.

One choice of channels is made for each kind of axis and used in every tensor that has it, so that what
belongs together stays together: residual channels and the MLP's inner channels evenly spread, attention
heads whole, with the key and value head that their query heads share. It is a start, not the teacher's
function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from student.errors import UserError

if TYPE_CHECKING:
    from student.modeling.other_tokenizer import NewEmbeddings

# Of a module's weight, by the last part of its name; a bias has the first axis alone.
_AXES = {
    "embed_tokens": ("tokens", "hidden"),
    "lm_head": ("tokens", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
}
_HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Narrowing:
    """The indices that are kept, by kind of axis; all of an axis that is not named. tokens: makes the rows of
    a student with another tokenizer out of the teacher's.
    """

    kept: dict[str, Tensor]
    tokens: NewEmbeddings | None = None

    def _axes(self, name: str, dimensions: int) -> Sequence[str]:
        module = name.split(".")[-2]
        norm = module.endswith("norm") and module not in _HEAD_NORMS
        return _AXES.get(module, ("hidden",) if norm else ())[:dimensions]

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the teacher's tensor once it is narrowed."""
        axes = self._axes(name, len(shape))
        new = [len(self.kept[axis]) if axis in self.kept else size for axis, size in zip(axes, shape)]  # noqa: B905
        if self.tokens is not None and axes[:1] == ("tokens",):
            new[0] = self.tokens.size
        return (*new, *shape[len(new) :])

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The part of the teacher's tensor `name` that the student keeps."""
        for place, axis in enumerate(self._axes(name, tensor.ndim)):
            if axis == "tokens" and self.tokens is not None:
                tensor = self.tokens(tensor)
            if axis in self.kept:
                tensor = tensor.index_select(place, self.kept[axis])
        return tensor


NO_NARROWING = Narrowing({})


def plan_narrowing(teacher: Any, student: Any) -> Narrowing:
    """From two text configurations; UserError where the student is wider or its heads are of another size."""
    kept = {}
    for axis, setting in (("hidden", "hidden_size"), ("inner", "intermediate_size")):
        wide, narrow = getattr(teacher, setting), getattr(student, setting)
        if wide != narrow:
            kept[axis] = torch.tensor(spread(wide, narrow, setting))
    heads = [_heads(config) for config in (teacher, student)]
    if heads[0] != heads[1]:
        kept["query"], kept["key"] = _kept_heads(*heads)
    return Narrowing(kept)


def spread(size: int, count: int, setting: str) -> list[int]:
    """`count` evenly spread numbers below `size`; UserError when there are not as many."""
    if count > size:
        raise UserError(
            f"--student-model-config: {setting} {count} is more than the teacher's {size}, so weights cannot "
            "be copied; use --init random"
        )
    return [index * size // count for index in range(count)]


def _heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key heads, size of a head)."""
    count = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or count
    return count, groups, getattr(config, "head_dim", None) or config.hidden_size // count


def _kept_heads(teacher: tuple[int, int, int], student: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Rows of the query projection and of the key and value projections."""
    if teacher[2] != student[2]:
        raise UserError(
            f"--student-model-config: the student's heads are {student[2]} wide, the teacher's {teacher[2]}; "
            f"heads are copied whole, so set head_dim {teacher[2]} or use --init random"
        )
    shared, own = (count // groups for count, groups, _ in (teacher, student))  # query heads of a key head
    keys = spread(teacher[1], student[1], "num_key_value_heads")
    within = spread(shared, own, "query heads per key and value head")
    queries = [key * shared + query for key in keys for query in within]
    return _rows(queries, teacher[2]), _rows(keys, teacher[2])


def _rows(heads: Sequence[int], size: int) -> Tensor:
    return torch.tensor([head * size + row for head in heads for row in range(size)])
