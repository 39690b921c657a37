"""Projectors: small modules that bring a student's hidden states to the teacher's width for a loss.

They are trained with the student and kept beside it in checkpoints, but are no part of it: an exported
student knows nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from distily.safety.parsing import read_json
from student.errors import StudentError, UserError
from student.shards import load_whole

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
IDENTITY = "identity"
PROJECTORS = (IDENTITY, *_MAKERS)


@dataclass(frozen=True)
class ProjectorSpec:
    """A projector of `PROJECTORS` that has something to learn, so not the identity."""

    kind: str
    student_width: int
    teacher_width: int

    def build(self) -> nn.Module:
        """A new module [..., student_width] -> [..., teacher_width], from torch's random numbers."""
        return _MAKERS[self.kind](self.student_width, self.teacher_width)


class Projectors(nn.ModuleDict):
    """The projectors of an objective, by name."""

    def __init__(self, specs: Mapping[str, ProjectorSpec]) -> None:
        super().__init__({name: spec.build() for name, spec in specs.items()})
        self.specs = dict(specs)

    def save(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes projectors.safetensors and projectors.json; nothing where there are none.

        state: whole tensors, where the projectors are sharded.
        """
        if not self.specs:
            return
        state = self.state_dict() if state is None else state
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / WEIGHTS_FILE)
        config = json.dumps(self._config(), indent=2, sort_keys=True) + "\n"
        (directory / CONFIG_FILE).write_text(config, encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote; UserError when it is of others, StudentError for a damaged file."""
        config, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
        try:
            saved = read_json(config) if config.is_file() else {}
            if saved != self._config():
                raise UserError(
                    f"--resume-from-checkpoint {directory}: it has {_names(saved)}, the objective asks for "
                    f"{_names(self._config())}; resume with the objective that it was trained with"
                )
            if self.specs:
                load_whole(self, load_file(weights))
        except UserError:
            raise
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise StudentError(f"{directory}: its projectors cannot be read: {error}") from error

    def _config(self) -> dict[str, Any]:
        return {name: asdict(spec) for name, spec in self.specs.items()}


def _names(config: Mapping[str, Any]) -> str:
    return f"the projectors {json.dumps(config, sort_keys=True)}" if config else "no projectors"
