"""push and pull, against a stand-in of the hub's HTTP API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from featurestore.catalogue.manifest import fullest_manifest
from featurestore.format.schema import HiddenSpec, LogitsSpec
from featurestore.reader import CacheReader
from featurestore.storage.root import root_of
from featurestore.store import FeatureStore
from pipeline.interchange.hub import safe
from tests.command import call, cli
from tests.hub import TOKEN, Files, Hub
from tests.student.caches import random_samples, write_cache

REPO = "me/features"
KEY = f"datasets/{REPO}"


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 9 samples in several shards."""
    groups = [LogitsSpec(top_k=8), HiddenSpec(2, "bf16")]
    return write_cache(
        tmp_path_factory.mktemp("made") / "cache", tiny_teacher, random_samples(9, 199), groups, 64
    )


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().running() as running:
        yield running


def files_in(directory: Path) -> Files:
    """What is shared of a store; plans whose tasks are all listed are of no use to who pulls."""
    found = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("plan-"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_a_store_comes_back_byte_for_byte(hub: Hub, store: Path, tmp_path: Path) -> None:
    pushed = json.loads(call("distily-cache", "push", store, REPO, "--private", "--json").stdout)
    assert hub.private == {KEY}
    assert hub.lfs, "nothing went the way of large files"
    back = tmp_path / "back"
    pulled = json.loads(call("distily-cache", "pull", REPO, back, "--json").stdout)
    assert files_in(back) == files_in(store)
    assert pulled["manifest"] == pushed["manifest"] == fullest_manifest(root_of(store))
    assert pulled["bytes"] == pushed["bytes"] == sum(map(len, files_in(store).values()))
    ours, theirs = CacheReader.open(store), CacheReader.open(back)
    assert len(theirs) == len(ours) == 9
    assert list(tmp_path.glob(".*")) == [], "the private directory is still there"


def test_the_card_says_what_it_is(hub: Hub, store: Path) -> None:
    from huggingface_hub import DatasetCard

    call("distily-cache", "push", store, REPO)
    card = DatasetCard(hub.repos[KEY]["README.md"].decode())
    assert card.data.task_categories == ["text-generation"]
    assert "distily-cache" in card.data.tags
    identity = FeatureStore.open(store).identity
    assert identity.architecture in card.text
    assert str(Path(identity.name).parent) not in card.text, "the teacher's directory is nobody's business"
    assert f"distily-cache pull {REPO}" in card.text
    assert fullest_manifest(root_of(store)) in card.text


def test_a_teacher_is_no_markup_in_the_card(hub: Hub, store: Path) -> None:
    from dataclasses import replace

    from markdown_it import MarkdownIt

    from featurestore.maintenance.info import store_info
    from pipeline.interchange.hub_card import store_card

    info = store_info(store)
    evil = "x](https://evil.example)\n\n# h\n\n| <img src=x> \x1b[2J ---\nlicense: mit"
    names = {"name": evil, "architecture": evil, "engine": evil, "dtype": evil}
    shapes = []
    for found in (info, replace(info, identity=replace(info.identity, **names))):
        head, text = store_card(found, REPO, 1).removeprefix("---\n").split("\n---\n", 1)
        assert "\x1b" not in text and "license" not in {line.partition(":")[0] for line in head.split("\n")}
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        inline = [child.type for token in tokens for child in token.children or []]
        assert set(inline) <= {"text", "text_special", "code_inline", "softbreak"}
        shapes.append([token.type for token in tokens])
    assert shapes[0] == shapes[1]


def test_a_record_that_holds_a_secret_is_not_pushed(
    hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions wrote them; what is written now holds none."""
    import featurestore.store

    FeatureStore.open(store).add_provenance(
        {"argv": ["generate", "--key-token", "hunter22", "https://u:p@h/"]}
    )
    assert not any(b"hunter22" in path.read_bytes() for path in (store / "provenance").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(featurestore.store, "for_record", lambda record: record)
        FeatureStore.open(store).add_provenance({"argv": ["generate", "--hub-token=hunter22"]})
    code, _, err = cli("push", store, REPO)
    assert (code, err.count("\n")) == (2, 1) and "provenance/" in err and "hunter22" not in err
    assert hub.uploads() == []


def test_a_store_for_which_there_is_no_room_is_not_pulled(
    hub: Hub, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("distily-cache", "push", store, REPO)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, _, err = cli("pull", REPO, tmp_path / "back")
    assert (code, err.count("\n")) == (2, 1) and "1,000 free" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_only_what_the_manifest_trusts_is_pushed(hub: Hub, store: Path) -> None:
    committed = files_in(store)
    bundle = next((store / "parts").iterdir())
    shutil.copytree(bundle, store / "parts" / f"{bundle.name[:17]}{'0' * 12}")
    (store / ".tmp-left").write_bytes(b"left")
    (store / "notes.txt").write_bytes(b"mine")
    (bundle / "extra").write_bytes(b"not in the record")
    call("distily-cache", "push", store, REPO)
    assert set(hub.repos[KEY]) == {*committed, "README.md", ".gitattributes"}


def test_a_store_that_grew_is_pushed_again(hub: Hub, tiny_teacher: Path, tmp_path: Path, store: Path) -> None:
    call("distily-cache", "push", store, REPO)
    grown = [*random_samples(9, 199), *random_samples(4, 199, seed=1)]
    write_cache(store, tiny_teacher, grown, [LogitsSpec(top_k=8), HiddenSpec(2, "bf16")], 64)
    assert len(list(store.glob("MANIFEST-*"))) == 2
    sent = len(hub.lfs)
    call("distily-cache", "push", store, REPO)
    assert len(hub.lfs) > sent
    newest = fullest_manifest(root_of(store))
    assert [name for name in hub.repos[KEY] if name.startswith("MANIFEST")] == [f"MANIFEST-{newest}.json"]
    call("distily-cache", "pull", REPO, tmp_path / "back")
    assert len(CacheReader.open(tmp_path / "back")) == len(CacheReader.open(store)) > 9


def test_another_store_is_not_pushed_over_it(hub: Hub, store: Path) -> None:
    call("distily-cache", "push", store, REPO)
    hub.repos[KEY]["SPEC.json"] += b" "
    before = dict(hub.repos[KEY])
    code, _, err = cli("push", store, REPO)
    assert (code, err.count("\n")) == (2, 1)
    assert "another store" in err
    assert hub.repos[KEY] == before


def test_a_damaged_store_is_not_pushed(hub: Hub, store: Path) -> None:
    file = next(path for path in (store / "parts").rglob("*.parquet"))
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    code, _, err = cli("push", store, REPO)
    assert code == 1
    assert file.name in err
    assert hub.uploads() == []


def test_a_damaged_file_on_the_hub_is_caught(hub: Hub, store: Path, tmp_path: Path) -> None:
    call("distily-cache", "push", store, REPO)
    name = next(name for name in hub.repos[KEY] if "/c/" in name)
    data = hub.repos[KEY][name]
    hub.repos[KEY][name] = data[:-1] + bytes([data[-1] ^ 1])
    code, _, err = cli("pull", REPO, tmp_path / "back")
    assert code == 1
    assert name in err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "parts/../../outside", "parts\\outside"])
def test_a_hostile_listing_is_refused(hub: Hub, store: Path, tmp_path: Path, name: str) -> None:
    hub.repos[KEY] = files_in(store) | {name: b"evil"}
    code, _, err = cli("pull", REPO, tmp_path / "back")
    assert (code, err.count("\n")) == (2, 1)
    assert "no store has" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_names_that_stay_inside() -> None:
    assert all(map(safe, ("SPEC.json", "parts/a/b/c/0/0", "..a", "a..", ".gitattributes")))
    assert not any(map(safe, ("", "/", "a//b", ".", "a/..", "C:a", "a\nb", "a/")))


def test_a_place_in_use_is_refused(hub: Hub, store: Path) -> None:
    before = files_in(store)
    code, _, err = cli("pull", REPO, store)
    assert (code, err.count("\n")) == (2, 1)
    assert "choose a new directory" in err
    assert files_in(store) == before
    assert hub.requests == []


def test_a_push_that_was_killed_is_no_store_yet(hub: Hub, store: Path, tmp_path: Path) -> None:
    hub.repos[KEY] = {name: data for name, data in files_in(store).items() if "MANIFEST" not in name}
    code, _, err = cli("pull", REPO, tmp_path / "back")
    assert code == 2
    assert "not complete" in err
    call("distily-cache", "push", store, REPO)
    call("distily-cache", "pull", REPO, tmp_path / "back")
    assert files_in(tmp_path / "back") == files_in(store)


def test_a_pull_that_was_killed_goes_on(hub: Hub, store: Path, tmp_path: Path) -> None:
    call("distily-cache", "push", store, REPO)
    kept = dict(hub.repos[KEY])
    # The listing stays as it was and one file cannot be had: the pull stops in the middle.
    lost = next(name for name in kept if name.startswith("MANIFEST"))
    hub.lost.add(lost)
    code, _, _ = cli("pull", REPO, tmp_path / "back")
    assert code == 2
    assert not (tmp_path / "back").exists()
    hub.lost.clear()
    hub.requests.clear()
    call("distily-cache", "pull", REPO, tmp_path / "back")
    got = {path.partition("/resolve/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert len(got) < len(files_in(store)), "what had come already came again"
    assert files_in(tmp_path / "back") == files_in(store)


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_refused_login_comes_before_any_upload(store: Path, token: str | None) -> None:
    assert token != TOKEN
    with Hub().running(token) as hub:
        code, out, err = cli("push", store, REPO)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "hf auth login" in err
    assert hub.uploads() == []
