"""What to capture per position, in plain JSON types, because it travels into vLLM's worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featurestore.format.schema import GroupSpec, HiddenSpec, LogitsSpec, LseSpec
from featurestore.format.states.transform import TRANSFORMED

# What our side and vLLM's worker call each other by: the key of vLLM's additional_config that holds the spec,
# and the pooling task whose output is one tensor row per position.
CONFIG_KEY = "distily_capture"
POOLING_TASK = "token_embed"


def captured_as(dtype: str) -> str:
    """The type in which an engine gives the states that are stored as `dtype`: those that need a basis, which
    is calibrated on what is captured, are encoded by who commits them.
    """
    return "f32" if dtype in TRANSFORMED else dtype


@dataclass(frozen=True, kw_only=True)
class CaptureSpec:
    """The features of one pass over the teacher.

    `vocab_size` columns of the logits count, the rest is padding. `top_k` is 0 when no distribution is
    wanted. `tail` draws per position depend on `seed`. `temperatures`, ascending and distinct, are those of
    which a logsumexp is wanted. `layers` are indices as in transformers' `output_hidden_states`, ascending
    and distinct; `hidden_dtypes` goes with them.
    """

    vocab_size: int
    top_k: int
    top_p: float | None
    tail: int
    seed: int
    temperatures: tuple[float, ...]
    layers: tuple[int, ...]
    hidden_dtypes: tuple[str, ...]

    @property
    def needs_logits(self) -> bool:
        """Whether the LM head has to run."""
        return bool(self.top_k or self.temperatures)

    @classmethod
    def from_groups(cls, groups: Sequence[GroupSpec], vocab_size: int) -> CaptureSpec:
        """Build the spec that produces exactly these column groups.

        Raises:
            ValueError: two distributions, a temperature twice, or a layer in two dtypes, in a single pass.
        """
        logits = [group for group in groups if isinstance(group, LogitsSpec)]
        hidden = sorted((g for g in groups if isinstance(g, HiddenSpec)), key=lambda group: group.layer)
        layers = tuple(group.layer for group in hidden)
        temperatures = tuple(sorted(group.temperature for group in groups if isinstance(group, LseSpec)))
        if len(logits) > 1 or any(len(set(many)) != len(many) for many in (layers, temperatures)):
            raise ValueError(
                "one pass captures one distribution, each temperature and each hidden layer once"
            )
        return cls(
            vocab_size=vocab_size,
            top_k=logits[0].top_k if logits else 0,
            top_p=logits[0].top_p if logits else None,
            tail=logits[0].tail if logits else 0,
            seed=logits[0].seed if logits else 0,
            temperatures=temperatures,
            layers=layers,
            hidden_dtypes=tuple(captured_as(group.dtype) for group in hidden),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CaptureSpec:
        return cls(
            vocab_size=int(value["vocab_size"]),
            top_k=int(value["top_k"]),
            top_p=None if value["top_p"] is None else float(value["top_p"]),
            tail=int(value["tail"]),
            seed=int(value["seed"]),
            temperatures=tuple(float(temperature) for temperature in value["temperatures"]),
            layers=tuple(int(layer) for layer in value["layers"]),
            hidden_dtypes=tuple(str(dtype) for dtype in value["hidden_dtypes"]),
        )
