"""Specs, identity and samples: what hashes to what, and what is refused."""

import numpy as np
import pytest

from featurestore.errors import FeatureStoreError, MissingFeatureError, StoreFormatError
from featurestore.format.kinds.table import covers, group_ids, group_spec_from_json
from featurestore.format.schema import (
    HiddenSpec,
    LogitsSpec,
    LseSpec,
    Sample,
    TeacherIdentity,
    group_id,
)
from tests.featurestore.helpers import hidden, identity, logits, sample


def test_ids_are_stable_for_ever() -> None:
    """These strings are names on people's disks. If this fails, the format has changed."""
    assert group_id(LogitsSpec(50)) == "logits-357ca350"
    assert group_id(HiddenSpec(2, "bf16")) == "hidden.L2-6f4dd92e"
    assert group_id(LseSpec(2)) == "lse.T2-f750ff06"
    one = Sample(tokens=np.arange(5, dtype=np.int32), loss_mask=np.array([1, 1, 0, 1, 0], dtype=bool))
    assert one.id == "b48cd36af650bff43c6d07318d92021e"


def test_specs_round_trip() -> None:
    for spec in (
        LogitsSpec(1),
        LogitsSpec(50, 0.95),
        LogitsSpec(8, 0.5, 24, 7),
        LogitsSpec(8, partial=True),
        HiddenSpec(0, "f32"),
        HiddenSpec(30, "fp8"),
        HiddenSpec(1, "int4"),
        HiddenSpec(1, "int2"),
        HiddenSpec(2, "bf16", 0.25),
        HiddenSpec(2, "bf16", 0.25, 7),
        LseSpec(0.05),
        LseSpec(100),
    ):
        assert group_spec_from_json(spec.to_json()) == spec
    assert LogitsSpec(50, 1.0) == LogitsSpec(50)
    assert len({group_id(s) for s in (LogitsSpec(50), LogitsSpec(51), LogitsSpec(50, 0.9))}) == 3


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"kind": "logits"},
        {"kind": "logits", "top_k": 0},
        {"kind": "logits", "top_k": 65_536},
        {"kind": "logits", "top_k": True},
        {"kind": "logits", "top_k": 5, "top_p": 0},
        {"kind": "logits", "top_k": 5, "later": 1},
        {"kind": "logits", "top_k": 5, "tail": -1},
        {"kind": "logits", "top_k": 5, "tail": 4097},
        {"kind": "logits", "top_k": 5, "seed": 1},
        {"kind": "logits", "top_k": 5, "partial": 1},
        {"kind": "logits", "top_k": 5, "tail": 4, "partial": True},
        {"kind": "hidden", "layer": -1, "dtype": "bf16"},
        {"kind": "hidden", "layer": 1, "dtype": "fp4"},
        {"kind": "hidden", "layer": 1, "dtype": "bf16", "positions": 0},
        {"kind": "hidden", "layer": 1, "dtype": "bf16", "positions": 1.5},
        {"kind": "hidden", "layer": 1, "dtype": "bf16", "positions": "all"},
        {"kind": "hidden", "layer": 1, "dtype": "bf16", "seed": 1},
        {"kind": "lse"},
        {"kind": "lse", "temperature": 1},
        {"kind": "lse", "temperature": 1.0},
        {"kind": "lse", "temperature": 0.049},
        {"kind": "lse", "temperature": 100.5},
        {"kind": "lse", "temperature": 0.1234},
        {"kind": "lse", "temperature": float("nan")},
        {"kind": "lse", "temperature": "2"},
        {"kind": "lse", "temperature": True},
        {"kind": "lse", "temperature": 2.0, "top_k": 5},
        {"kind": ["x"]},
    ],
)
def test_invalid_specs_are_refused(value: object) -> None:
    with pytest.raises(StoreFormatError):
        group_spec_from_json(value)


@pytest.mark.parametrize(
    ("temperature", "kind"),
    [(2, "lse.T2"), (0.5, "lse.T0.5"), (0.05, "lse.T0.05"), (99.999, "lse.T99.999"), (100.0, "lse.T100")],
)
def test_a_temperature_is_named_by_its_shortest_decimal_form(temperature: float, kind: str) -> None:
    spec = LseSpec(temperature)
    assert spec.kind == kind and group_ids().fullmatch(group_id(spec))
    assert group_id(LseSpec(2)) == group_id(LseSpec(2.0))
    assert covers(spec, spec) and not covers(spec, LseSpec(3)) and not covers(LogitsSpec(5), spec)


@pytest.mark.parametrize(
    "name", ["lse.T2.0", "lse.T02", "lse.T", "lse.T2.", "lse.T0.1234", "lse.T-2", "lse.T1000"]
)
def test_other_spellings_of_a_temperature_are_no_group(name: str) -> None:
    assert not group_ids().fullmatch(f"{name}-00000000")


def test_identity_compares_all_but_name_and_engine_version() -> None:
    assert TeacherIdentity.from_json(identity().to_json()) == identity()
    assert not identity().differences(identity(name="elsewhere/tiny", engine_version="6"))
    assert identity().differences(identity(dtype="bfloat16")) == [("dtype", "float32", "bfloat16")]
    for bad in ({}, {**identity().to_json(), "more": 1}, {**identity().to_json(), "vocab_size": -1}):
        with pytest.raises(StoreFormatError):
            TeacherIdentity.from_json(bad)


def test_the_mask_is_part_of_a_sample() -> None:
    one = sample(1, 10)
    other = Sample(tokens=one.tokens, loss_mask=~one.loss_mask)
    assert one.id != other.id and len(one) == 10 and one.id == sample(1, 10).id


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        (np.zeros(0, np.int32), np.zeros(0, bool)),
        (np.zeros(3, np.int64), np.zeros(3, bool)),
        (np.zeros(3, np.int32), np.zeros(4, bool)),
        (np.array([-1], np.int32), np.ones(1, bool)),
        (np.zeros((2, 2), np.int32), np.zeros((2, 2), bool)),
    ],
)
def test_invalid_samples_are_refused(tokens: np.ndarray, mask: np.ndarray) -> None:
    with pytest.raises(ValueError):
        Sample(tokens=tokens, loss_mask=mask)


def test_feature_checks_name_the_field() -> None:
    one = sample(1, 10)
    with pytest.raises(ValueError, match="counts"):
        logits(one, LogitsSpec(5)).check(11)
    with pytest.raises(ValueError, match="values"):
        hidden(one, HiddenSpec(1, "int8")).check(10, 99)


def test_missing_feature_reads_as_a_sentence() -> None:
    error = MissingFeatureError("no logits here")
    assert (
        str(error) == "no logits here"
        and isinstance(error, KeyError)
        and isinstance(error, FeatureStoreError)
    )
