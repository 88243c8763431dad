"""Objects exist with their manifest only, first manifest wins, and damaged bytes are noticed."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged, StoreRefused
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Part
from spinreg_core.store.base import Store
from spinreg_core.store.hashing import sha256_file
from spinreg_core.store.open import open_store


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(f"s3://{request.getfixturevalue('s3_server').bucket}/{uuid.uuid4().hex}")


def job(tmp_path: Path, writer: str = "e0001-aaaa", **key: object) -> Job:
    return Job("train", objects.fingerprint("train", key), key, "", writer, 1, {}, RunConfig(), tmp_path)


def folder(tmp_path: Path, **files: str) -> Path:
    root = tmp_path / uuid.uuid4().hex
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_fingerprint_depends_on_everything_but_the_order() -> None:
    one = objects.fingerprint("train", {"a": 1, "b": [1, 2]})
    assert one == objects.fingerprint("train", {"b": [1, 2], "a": 1})
    others = [
        objects.fingerprint("evaluate", {"a": 1, "b": [1, 2]}),
        objects.fingerprint("train", {"a": 1.5, "b": [1, 2]}),
        objects.fingerprint("train", {"a": 1, "b": [2, 1]}),
        objects.fingerprint("train", {"a": 1}),
    ]
    assert len({one, *others}) == 5


def test_fetch_after_publish_gives_the_same_files(store: Store, tmp_path: Path) -> None:
    j = job(tmp_path, a=1)
    assert objects.read_manifest(store, j.object_id) is None
    manifest = objects.publish(
        store,
        j,
        folder(tmp_path, policy__config="{}", policy__sub__weights="w" * 999, notes="n"),
        metrics={"loss": 0.5},
    )
    assert objects.read_manifest(store, j.object_id) == manifest
    assert manifest.metrics == {"loss": 0.5}
    assert {f.name for f in manifest.files} == {"policy/config", "policy/sub/weights", "notes"}
    assert fetch.fetch_file(store, j.object_id, "notes").read_text() == "n"
    policy = fetch.fetch_folder(store, j.object_id, "policy")
    assert (policy / "config").read_text() == "{}"
    assert (policy / "sub" / "weights").read_text() == "w" * 999
    assert fetch.fetch_folder(store, j.object_id, "policy") == policy
    with pytest.raises(Damaged, match="no file 'other'"):
        fetch.fetch_file(store, j.object_id, "other")


def test_publish_of_a_second_attempt_returns_the_first_manifest(store: Store, tmp_path: Path) -> None:
    first, second = job(tmp_path, "e0001-aaaa"), job(tmp_path, "e0002-bbbb")
    won = objects.publish(store, first, folder(tmp_path, f="first"), metrics={})
    assert objects.publish(store, second, folder(tmp_path, f="second"), metrics={}) == won
    assert fetch.fetch_file(store, first.object_id, "f").read_text() == "first"


def commit(store: Store, j: Job, name: str, files: Path) -> Part:
    return objects.commit_part(store, j, name, objects.upload(store, j, files), {"rows": 1})


def test_delete_part_removes_its_files_and_no_others(store: Store, tmp_path: Path) -> None:
    j = job(tmp_path, a=4)
    old = commit(store, j, "step-000001", folder(tmp_path, step1__x="1"))
    new = commit(store, j, "step-000002", folder(tmp_path, step2__x="2"))
    objects.delete_part(store, j.object_id, old)
    objects.delete_part(store, j.object_id, old)  # again after a kill half way
    assert objects.usable_parts(store, j.object_id) == {"step-000002": new}
    assert store.size(old.files[0].key) is None
    assert [p.read_text() for p in fetch.fetch_part(store, new).values()] == ["2"]


def test_commit_part_keeps_the_first_and_publish_lists_it(store: Store, tmp_path: Path) -> None:
    j = job(tmp_path, a=2)
    commit(store, j, "shard-00001", folder(tmp_path, shards__00001="b"))
    first = commit(store, j, "shard-00000", folder(tmp_path, shards__00000="a"))
    later = job(tmp_path, "e0002-bbbb", a=2)
    assert commit(store, later, "shard-00000", folder(tmp_path, shards__00000="other")) == first
    parts = objects.usable_parts(store, j.object_id)
    assert list(parts) == ["shard-00000", "shard-00001"]
    assert [p.read_text() for p in fetch.fetch_part(store, parts["shard-00000"]).values()] == ["a"]
    objects.publish(store, later, folder(tmp_path, summary="s"), metrics={}, parts=parts)
    assert fetch.fetch_file(store, j.object_id, "shards/00000").read_text() == "a"
    assert fetch.fetch_file(store, j.object_id, "shards/00001").read_text() == "b"


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_fetch_folder_of_a_damaged_file_raises(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path / "store"))
    j = job(tmp_path, a=3)
    manifest = objects.publish(store, j, folder(tmp_path, policy__w="weights"), metrics={})
    path = store.local_path(manifest.files[0].key)
    assert path is not None
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("weight" if damage == "truncated" else "WEIGHTS")
    with pytest.raises(Damaged, match=r"policy/w.*expected"):
        fetch.fetch_folder(store, j.object_id, "policy")


def unreadable(path: Path) -> None:
    """A file that is there for whoever lists, and cannot be read by anybody, root included: a bad disk's stand-in."""
    path.unlink()
    path.symlink_to(path)


def test_fetch_folder_of_an_unreadable_file_raises_one_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    j = job(tmp_path, a=3)
    manifest = objects.publish(store, j, folder(tmp_path, policy__w="weights"), metrics={})
    path = store.local_path(manifest.files[0].key)
    assert path is not None
    unreadable(path)
    with pytest.raises(StoreRefused, match=r"reading .*/policy/w: found .*Too many levels"):
        fetch.fetch_folder(store, j.object_id, "policy")
    with pytest.raises(StoreRefused, match=r"reading .*/policy/w: found .*Too many levels"):
        sha256_file(path)
    with pytest.raises(StoreRefused, match=r"reading .*/policy/w: found .*Too many levels"):
        store.size(manifest.files[0].key)


@pytest.mark.slow
def test_fetch_file_with_a_damaged_cached_copy_fetches_again(
    s3_server: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")  # type: ignore[attr-defined]
    j = job(tmp_path, a=4)
    objects.publish(store, j, folder(tmp_path, policy__w="weights"), metrics={})
    copy = fetch.fetch_file(store, j.object_id, "policy/w")
    assert fetch.fetch_folder(store, j.object_id, "policy") != copy.parent
    for spoil in (lambda: copy.write_text("?"), lambda: unreadable(copy)):
        spoil()
        assert fetch.fetch_file(store, j.object_id, "policy/w").read_text() == "weights"
    assert (fetch.fetch_folder(store, j.object_id, "policy") / "w").read_text() == "weights"


def test_read_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.create("objects/train-1/manifest.json", json.dumps({"schema": 99}).encode())
    with pytest.raises(BadInput, match="schema 99"):
        objects.read_manifest(store, "train-1")
    store.create("objects/train-2/manifest.json", b"{")
    with pytest.raises(Damaged, match="that spinreg did not write"):
        objects.read_manifest(store, "train-2")
    with pytest.raises(Damaged, match=r"no manifest\.json"):
        fetch.fetch_file(store, "train-3", "f")
