"""Projectors: small modules that bring a student's hidden states to the teacher's width for a loss.

They are trained with the student and kept beside it in checkpoints, but are no part of it: an exported
student knows nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from student.errors import StudentError

WEIGHTS_FILE = "projectors.safetensors"
CONFIG_FILE = "projectors.json"


def _linear(student_width: int, teacher_width: int) -> nn.Module:
    """x W (TinyBERT, arXiv:1909.10351), W at first a rotation, so that no state changes its size."""
    layer = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return layer


def _mlp(student_width: int, teacher_width: int) -> nn.Module:
    """Two layers with GELU between them, the inner one as wide as the teacher."""
    return nn.Sequential(
        nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
    )


def _orthogonal(student_width: int, teacher_width: int) -> nn.Module:
    """x W with W always orthogonal, the exponential of a skew matrix (VkD, arXiv:2403.06213): it keeps
    lengths and angles, so all that is learned has to be learned by the student.
    """
    layer = nn.Linear(student_width, teacher_width, bias=False)
    return parametrizations.orthogonal(layer, orthogonal_map="matrix_exp")


_MAKERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "orthogonal": _orthogonal,
}
PROJECTORS = ("identity", *_MAKERS)


@dataclass(frozen=True)
class ProjectorSpec:
    """A projector of `PROJECTORS`; identity needs equal widths."""

    kind: str
    student_width: int
    teacher_width: int

    def build(self) -> nn.Module:
        """A new module [..., student_width] -> [..., teacher_width], from torch's random numbers."""
        if self.kind == "identity":
            assert self.student_width == self.teacher_width
            return nn.Identity()
        return _MAKERS[self.kind](self.student_width, self.teacher_width)


class Projectors(nn.ModuleDict):
    """The projectors of an objective by the names of its terms."""

    def __init__(self, specs: Mapping[str, ProjectorSpec]) -> None:
        super().__init__({name: spec.build() for name, spec in specs.items()})
        self.specs = dict(specs)

    def save(self, directory: Path) -> None:
        """Writes projectors.safetensors and projectors.json; nothing where there is nothing to learn."""
        state = self.state_dict()
        if state:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / WEIGHTS_FILE)
            config = {name: asdict(spec) for name, spec in self.specs.items()}
            (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote; StudentError unless it is of the same projectors."""
        if not self.state_dict():
            return
        try:
            config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
            state = load_file(directory / WEIGHTS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise StudentError(f"{directory}: its projectors cannot be read: {error}") from error
        if config != {name: asdict(spec) for name, spec in self.specs.items()}:
            raise StudentError(
                f"{directory}: its projectors are of another objective; go on with the objective that it was "
                "trained with"
            )
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise StudentError(f"{directory}: its projectors do not fit: {error}") from error
