"""klt4 and klt6: what a row of bytes is, how the basis gets into a store, and what becomes of it there."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from featurestore.errors import FeatureStoreError, SpecMismatchError
from featurestore.format.kinds.hidden import HiddenKind
from featurestore.format.schema import HiddenFeatures, HiddenSpec
from featurestore.format.sidecar import HeadSpec, Part, Tensor
from featurestore.format.states.transform import Basis, decode_transformed, encode_transformed
from featurestore.maintenance.merge import merge_stores
from featurestore.maintenance.verify import verify_store
from featurestore.reader import CacheReader
from featurestore.store import FeatureStore
from pipeline.generate.bases import Bases
from pipeline.teacher.basis import calibrate, fisher, gaussian_levels
from student.data.batches import Collator
from student.data.dataset import DistillationDataset
from student.data.decoding import Transform, decode_hidden
from tests.command import call, generate
from tests.featurestore.helpers import identity
from tests.teachers import text_of

EPSILON = float(np.finfo(np.float32).eps)
BITS = {"klt4": 4, "klt6": 6}


def head_of(size: int, vocab: int = 50, seed: int = 0) -> Part[HeadSpec]:
    weight = np.random.default_rng(seed).standard_normal((vocab, size)).astype(np.float32)
    spec = HeadSpec(vocab_size=vocab, hidden_size=size, norm_eps=0.0, logit_scale=0.5)
    return Part(spec, {"weight": Tensor("f32", weight)})


def states_of(size: int, rows: int, seed: int = 0) -> np.ndarray:
    """Correlated, off the origin and of different lengths."""
    chance = np.random.default_rng(seed)
    mixed = chance.standard_normal((rows, size)) @ (
        chance.standard_normal((size, size)) / np.arange(1, size + 1)
    )
    return (mixed * chance.uniform(0.5, 2, (rows, 1)) + 3).astype(np.float32)


@cache
def basis_of(size: int, dtype: str) -> Basis:
    spec, tensors = calibrate(states_of(size, 64), head_of(size), dtype)
    arrays = {name: tensor.values for name, tensor in tensors.items()}
    return Basis(dtype=dtype, counts=spec.counts, digest="ab" * 16, **arrays)


sizes = pytest.mark.parametrize("size", [8, 9, 64, 65, 130])
both = pytest.mark.parametrize("dtype", BITS)


@both
@sizes
def test_a_row_is_what_the_format_says(size: int, dtype: str) -> None:
    """Read bit by bit in float64: levels of the nearest codes, and the state that they stand for."""
    basis, given = basis_of(size, dtype), states_of(size, 20, 1)
    given[3] = basis.mean
    rows = encode_transformed(given, basis)
    assert rows.shape == (20, size * BITS[dtype] // 8)
    widths = [bits for bits, count in zip(range(8, 0, -1), basis.counts, strict=True) for _ in range(count)]
    assert sum(widths) == 8 * (rows.shape[1] - 2) and len(widths) == len(basis.decode)
    starts = [0, 2, 6, 14, 30, 62, 126, 254]
    decoded = decode_transformed(rows, basis)
    for row, state, found in zip(rows, given.astype(np.float64), decoded, strict=True):
        bits = [byte >> place & 1 for byte in row[2:].tolist() for place in range(8)]
        scale = float((np.uint32(int(row[0]) | int(row[1]) << 8) << 16).astype(np.uint32).view(np.float32))
        at = (state - basis.mean) @ basis.encode.astype(np.float64)
        assert scale == pytest.approx(np.sqrt(np.square(at).mean()), rel=2.0**-8)
        value, begin = np.zeros(len(widths)), 0
        for place, width in enumerate(widths):
            code = sum(bits[begin + i] << i for i in range(width))
            table = basis.levels[starts[width - 1] : starts[width - 1] + 2**width].astype(np.float64)
            value[place], begin = table[code], begin + width
            if scale:
                error = np.abs(table - at[place] / scale)
                # The state is rounded to 21 bits of its largest number before it is multiplied.
                rounding = 2.0**-20 * np.abs(state - basis.mean).max() * np.abs(basis.encode[:, place]).sum()
                assert error[code] <= error.min() + 2 * rounding / scale
        plain = basis.mean + scale * value @ basis.decode.astype(np.float64)
        bound = (
            EPSILON * (len(widths) + 3) * (np.abs(scale * value) @ np.abs(basis.decode) + np.abs(basis.mean))
        )
        assert (np.abs(found - plain) <= bound).all()
    np.testing.assert_array_equal(decoded[3], basis.mean)


@both
@given(size=st.sampled_from([8, 9, 15, 64, 90]), seed=st.integers(0, 2**31), rows=st.integers(1, 40))
def test_rows_do_not_depend_on_the_batch_and_torch_reads_the_same(
    size: int, seed: int, rows: int, dtype: str
) -> None:
    basis, given = basis_of(size, dtype), states_of(size, rows, seed)
    coded = encode_transformed(given, basis)
    one = rows // 2
    np.testing.assert_array_equal(coded[one : one + 1], encode_transformed(given[one : one + 1], basis))
    found = decode_hidden({f"{dtype}.x": torch.from_numpy(coded)[None]}, {"x": Transform.of(basis)})
    plain = decode_transformed(coded, basis)
    assert found.shape == (1, rows, size)
    bound = 4 * EPSILON * (len(basis.decode) + 2) * (np.abs(plain).max() + np.abs(basis.mean).max())
    assert np.abs(found[0].numpy() - plain).max() <= bound * np.linalg.cond(basis.decode)


def test_the_metric_is_the_curvature_of_the_kl_divergence() -> None:
    """KL of a small error e is e' F e / 2, up to the third order: averaged over e and -e."""
    size, part = 12, head_of(12)
    state = states_of(size, 1)
    weight = torch.from_numpy(part.tensors["weight"].values).double()
    error = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3

    def logprobs(shift: torch.Tensor) -> torch.Tensor:
        return (0.5 * weight @ (torch.from_numpy(state[0]).double() + shift)).log_softmax(-1)

    p = logprobs(torch.zeros(size))
    kls = [(p.exp() * (p - logprobs(sign * error))).sum().item() for sign in (1, -1)]
    expected = (error @ fisher(state, part) @ error / 2).item()
    assert sum(kls) / 2 == pytest.approx(expected, rel=1e-4)


@both
@pytest.mark.parametrize("shard", ["two", "five", "the same", "zeros", "any token"])
def test_of_a_first_shard_that_shows_little_the_basis_serves_later_ones(shard: str, dtype: str) -> None:
    """What is stored of other states is nearer to them than their mean is."""
    size, later = 64, states_of(64, 200)
    head = head_of(size)
    if shard == "any token":
        head.tensors["weight"].values[:] = 0
    first = {"two": later[:2], "five": later[:5], "the same": later[[0] * 9], "zeros": 0 * later}
    spec, tensors = calibrate(first.get(shard, later), head, dtype)
    arrays = {name: tensor.values for name, tensor in tensors.items()}
    basis = Basis(dtype=dtype, counts=spec.counts, digest="ab" * 16, **arrays)
    found = decode_transformed(encode_transformed(later, basis), basis)
    assert np.linalg.norm(found - later) < np.linalg.norm(later - later.mean(axis=0))


def test_levels_are_those_of_lloyd_and_max() -> None:
    """Published: Max 1960, table I."""
    assert gaussian_levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-4)
    assert gaussian_levels(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=5e-4)
    assert gaussian_levels(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=5e-4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text_of(60, i)}) for i in range(24)))
    return file


FLAGS = ("--top-k", 4, "--final", "--final-dtype", "klt6", "--shard-tokens", 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, corpus: Path) -> Path:
    store = tmp_path_factory.mktemp("made") / "store"
    generate(tiny_teacher, corpus, store, *FLAGS, "--num-samples", 16)
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def kl_of(store: Path, teacher: Path) -> float:
    """The mean KL divergence from the teacher's own distribution to that of the stored states, as a part of
    the one to that of their mean.
    """
    reader, found, blank = CacheReader.open(store), [], []
    (spec,) = [spec for spec in reader.groups.values() if isinstance(spec, HiddenSpec)]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval().double()
    head = torch.from_numpy(reader.sidecar().head().tensors["weight"].to_float32()).double()
    for index in range(len(reader)):
        sample = reader.read(index)
        states = sample.features[spec]
        assert isinstance(states, HiddenFeatures) and states.basis is not None
        with torch.inference_mode():
            p = model(torch.from_numpy(sample.tokens).long()[None]).logits[0].log_softmax(-1)
        flat = (torch.from_numpy(states.basis.mean).double() @ head.T).log_softmax(-1)
        q = (torch.from_numpy(states.to_float32()).double() @ head.T).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
        blank.append((p.exp() * (p - flat)).sum(-1))
    return float(torch.cat(found).mean() / torch.cat(blank).mean())


def test_a_later_run_and_a_smaller_type_find_their_bases(
    store: Path, tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    before = (store / "teacher" / "klt6.safetensors").read_bytes()
    assert generate(tiny_teacher, corpus, store, *FLAGS)["samples"] == 24
    assert (store / "teacher" / "klt6.safetensors").read_bytes() == before
    assert verify_store(store, deep=True).sound
    four = tmp_path / "four"
    generate(tiny_teacher, corpus, four, *FLAGS, "--final-dtype", "klt4")
    # Less than a Gaussian leaves of its variance in 6 and in 4 bits, by the levels of Lloyd and Max.
    assert 0 < kl_of(store, tiny_teacher) < 10**-3.19
    assert 0 < kl_of(four, tiny_teacher) < 10**-2.02
    assert "relative error" in call("distily-cache", "info", store).stdout


def test_numpy_torch_and_batches_give_the_same_states(store: Path) -> None:
    reader = CacheReader.open(store)
    spec = reader.find("hidden.L3")
    exact = reader.read(2, [spec]).features[spec].to_float32()
    (item,) = [DistillationDataset(reader)[2]["teacher_hidden_3"].numpy()]
    np.testing.assert_allclose(item, exact, rtol=1e-4, atol=1e-4)
    batch = Collator([spec], 0)([reader.read_codes(i, [spec]) for i in (2, 5)])["coded_hidden"][3]
    basis = reader.basis("klt6")
    assert list(batch) == [f"klt6.{basis.digest}"]
    found = decode_hidden(batch, {basis.digest: Transform.of(basis)})[0, : len(exact)]
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-4, atol=1e-4)


def test_of_writers_that_calibrate_at_once_one_wins(made: Path, tmp_path: Path) -> None:
    """Each has a shard and an idea of its own; all encode in the basis that is in the store."""
    shutil.copytree(made, tmp_path / "store", ignore=shutil.ignore_patterns("klt6*"))
    for listing in (tmp_path / "store").glob("TEACHER-*.json"):
        if "klt6" in listing.read_text():
            listing.unlink()
    stores = [FeatureStore.open(tmp_path / "store") for _ in range(4)]
    assert stores[0].basis("klt6") is None
    shards = [states_of(stores[0].identity.hidden_size, 40, seed) for seed in range(4)]
    spec = HiddenSpec(stores[0].identity.num_layers, "klt6")

    def write(number: int) -> HiddenFeatures:
        captured = HiddenFeatures(shards[number], None, "f32")
        (found,) = Bases(stores[number]).encode(spec, [captured])
        assert isinstance(found, HiddenFeatures)
        return found

    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write, range(4)))
    basis = stores[0].basis("klt6")
    assert basis is not None
    for shard, found in zip(shards, written, strict=True):
        assert found.basis is not None and found.basis.digest == basis.digest
        np.testing.assert_array_equal(found.values, encode_transformed(shard, basis))


def damaged(data: bytes) -> dict[str, bytes | None]:
    middle = len(data) // 2
    return {
        "missing": None,
        "empty": b"",
        "cut": data[:-1],
        "a bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    }


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "a bit"])
def test_damage_of_the_basis_is_named(store: Path, what: str, tiny_teacher: Path, corpus: Path) -> None:
    file = store / "teacher" / "klt6.safetensors"
    data = damaged(file.read_bytes())[what]
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    reader = CacheReader.open(store)
    with pytest.raises(FeatureStoreError, match="klt6") as refused:
        reader.read(0, [reader.find("hidden.L3")])
    assert "\n" not in str(refused.value)
    assert {problem.path for problem in verify_store(store, deep=True).problems} >= {
        "teacher/klt6.safetensors"
    }
    words = (tiny_teacher, corpus, "--out", store, "--engine", "transformers", *FLAGS)
    done = call("distily-cache", "generate", *words, code=None)
    assert done.returncode in (1, 2) and "klt6.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_a_basis_of_another_store_is_refused(
    store: Path, tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Its file is sound and is listed, but the rows were made in another."""
    other = tmp_path / "other"
    generate(tiny_teacher, corpus, other, *FLAGS, "--shuffle-seed", 1)
    for file in [*other.glob("TEACHER-*.json"), other / "teacher" / "klt6.safetensors"]:
        shutil.copy(file, store / file.relative_to(other))
    for listing in store.glob("TEACHER-*.json"):
        if not (other / listing.name).exists():
            listing.unlink()
    reader = CacheReader(FeatureStore.open(store).root, CacheReader.open(store).manifest_digest)
    with pytest.raises(FeatureStoreError, match="made in the basis") as refused:
        reader.read(0, [reader.find("hidden.L3")])
    assert "\n" not in str(refused.value)
    assert not verify_store(store, deep=True).sound
    with pytest.raises(SpecMismatchError, match="different bases"):
        merge_stores(tmp_path / "all", [other, _fresh(tmp_path, tiny_teacher, corpus)])
    assert not (tmp_path / "all").exists()


def _fresh(tmp_path: Path, teacher: Path, corpus: Path) -> Path:
    generate(teacher, corpus, tmp_path / "fresh", *FLAGS, "--num-samples", 8)
    return tmp_path / "fresh"


def test_halves_in_one_basis_are_merged_and_copied(
    store: Path, tiny_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """Two machines start from one store, whose first shard made the basis."""
    other = Path(shutil.copytree(store, tmp_path / "other"))
    generate(tiny_teacher, corpus, other, *FLAGS)
    merge_stores(tmp_path / "all", [store, other])
    call("distily-cache", "gc", tmp_path / "all", "--delete")
    assert verify_store(tmp_path / "all", deep=True).sound
    reader, source = CacheReader.open(tmp_path / "all"), CacheReader.open(other)
    assert len(reader) == 24
    spec = reader.find("hidden.L3")
    for index, sample_id in enumerate(reader.sample_ids):
        theirs = source.read(list(source.sample_ids).index(sample_id), [spec]).features[spec].to_float32()
        np.testing.assert_array_equal(reader.read(index, [spec]).features[spec].to_float32(), theirs)


def test_a_student_learns_from_the_final_states(store: Path, tmp_path: Path) -> None:
    """And `plan` traces the same, and `eval` measures by it."""
    (tmp_path / "objective.yaml").write_text("terms: [{loss: full_reverse_kl}]")
    shape = ("--student-model-config", '{"num_hidden_layers": 1}', "--no-bf16")
    flags = (*shape, "--objective", tmp_path / "objective.yaml", "--max-steps", 2)
    call("distily-train", "plan", store, "--output-dir", tmp_path / "out", *flags)
    call("distily-train", "from-cache", store, "--output-dir", tmp_path / "out", *flags)
    call("distily-train", "eval", tmp_path / "out", "--cache", store)


def test_what_the_flag_cannot_give_is_refused(tiny_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    words = (tiny_teacher, corpus, "--out", tmp_path / "x", "--final-dtype", "klt4")
    assert "--final" in call("distily-cache", "generate", *words, code=2).stderr
    with pytest.raises(ValueError, match="enters the LM head"):
        HiddenKind().check_teacher(HiddenSpec(1, "klt4"), identity())
