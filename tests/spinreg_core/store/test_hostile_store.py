"""Hostile stores: no document of another writer leads out of the store, the cache or the work folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.head import read_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.store import documents
from spinreg_core.store import remote_files as s3_files
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from spinreg_core.store.s3 import RemoteFile, S3Store
from tests.support.builders import make_job
from tests.support.remote_store import RemoteStore


@pytest.fixture(params=["remote", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    return (RemoteStore if request.param == "remote" else FolderStore)(tmp_path / "store")


def job(tmp_path: Path) -> Job:
    return make_job("train", tmp_path, object_id=objects.fingerprint("train", {}))


def published(store: FolderStore, tmp_path: Path) -> Manifest:
    policy = tmp_path / "made" / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    return objects.publish(store, job(tmp_path), tmp_path / "made", metrics={})


def rewritten(store: FolderStore, manifest: Manifest, change: Callable[[dict[str, Any]], None]) -> str:
    """Put a changed manifest in place; its object's id."""
    said = documents.plain(manifest)
    change(said)
    (store.root / "objects" / manifest.object_id / "manifest.json").write_bytes(documents.dump(said))
    return manifest.object_id


def outside(tmp_path: Path) -> dict[str, str]:
    """Return all files outside the cache and the store."""
    own = (tmp_path / "cache", tmp_path / "store")
    return {
        str(path): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file() and not any(path.is_relative_to(place) for place in own)
    }


HOSTILE: list[dict[str, Any]] = [
    {"name": "policy/../../../../victim"},
    {"name": "policy//{tmp}/victim"},
    {"name": "{tmp}/victim"},
    {"name": "policy/./config.json"},
    {"name": "policy/"},
    {"name": "policy/a\x00b"},
    {"name": 7},
    {"key": "objects/{id}/../../../victim"},
    {"key": "objects/../victim"},
    {"key": "{tmp}/victim"},
    {"key": "runs/other/head.json"},
    {"key": "objects/other/data/w/policy/config.json"},
    {"sha256": "../../victim"},
    {"sha256": "{tmp}/victim"},
    {"sha256": None},
    {"size": -1},
    {"size": "2"},
    {"size": True},
]


@pytest.mark.parametrize("entry", HOSTILE, ids=[f"{i}-{next(iter(entry))}" for i, entry in enumerate(HOSTILE)])
def test_manifest_with_files_of_another_object_is_damaged(
    store: FolderStore, tmp_path: Path, entry: dict[str, Any]
) -> None:
    (tmp_path / "victim").write_text("before")
    manifest = published(store, tmp_path)
    told = {"tmp": str(tmp_path), "id": manifest.object_id}
    entry = {name: value.format(**told) if isinstance(value, str) else value for name, value in entry.items()}
    before = outside(tmp_path)
    object_id = rewritten(store, manifest, lambda m: m["files"][0].update(entry))
    for read in (fetch.fetch_folder, fetch.fetch_files, fetch.fetch_file):
        with pytest.raises(Damaged, match=r"manifest\.json: found .*(as files\.0\.|; expected files of objects/)"):
            read(store, object_id, "policy")
    assert outside(tmp_path) == before
    assert not any((cache_folder() / "objects").rglob("*"))


@pytest.mark.parametrize(
    "change", [lambda m: m.pop("files"), lambda m: m.update(files=[7]), lambda m: m.update(files=7)]
)
def test_manifest_without_files_is_damaged(store: FolderStore, tmp_path: Path, change: Any) -> None:
    object_id = rewritten(store, published(store, tmp_path), change)
    with pytest.raises(Damaged, match=r"manifest\.json: found .* as files"):
        objects.read_manifest(store, object_id)


def test_manifest_with_removed_keys_of_another_object_is_damaged(store: FolderStore, tmp_path: Path) -> None:
    gone = {"marked": True, "why": "", "at": "", "keys": ["runs/other/head.json"]}
    object_id = rewritten(store, published(store, tmp_path), lambda m: m.update(removed=gone))
    with pytest.raises(Damaged, match=r"found .runs/other/head\.json. as (removed\.keys\.0|files\.0\.key)"):
        objects.read_record(store, object_id)


def test_part_cannot_delete_files_of_another_object(store: FolderStore, tmp_path: Path) -> None:
    """`delete_part` removes what a part lists."""
    entry = {"name": "x", "key": "runs/other/head.json", "size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    store.create("runs/other/head.json", b"")
    part = {"schema": 1, "name": "step-000001", "files": [entry], "meta": {}}
    store.create("objects/train-1/parts/step-000001.json", documents.dump(part))
    with pytest.raises(Damaged, match=r"found .runs/other/head\.json. as (removed\.keys\.0|files\.0\.key)"):
        objects.read_part(store, "train-1", "step-000001")


def test_fetched_policy_holds_the_listed_files_only(tmp_path: Path) -> None:
    """A library that loads a folder looks for names: an adapter, say, or weights in another format."""
    store = open_store(str(tmp_path / "store"))
    manifest = published(store, tmp_path)  # type: ignore[arg-type]
    folder = fetch.fetch_folder(store, manifest.object_id, "policy")
    (folder / ".tmp-0").write_text("what a killed writer left")
    assert fetch.fetch_folder(store, manifest.object_id, "policy") == folder
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Damaged, match=r"found 'pytorch_model.bin', which no manifest lists"):
        fetch.fetch_folder(store, manifest.object_id, "policy")


@pytest.mark.parametrize("object_id", ["../../victim", "..", "a/../../b", "/etc", ""])
def test_object_id_that_leads_elsewhere_is_refused(store: FolderStore, object_id: str) -> None:
    for use in (lambda: fetch.fetch_folder(store, object_id, "policy"), lambda: objects.usable_parts(store, object_id)):
        with pytest.raises(BadInput, match="store key"):
            use()


def test_document_that_nests_too_deeply_is_damaged(store: FolderStore) -> None:
    store.create("runs/x/head.json", b'{"schema": 1, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    with pytest.raises(Damaged, match="expected JSON"):
        read_head(store, "x")


@pytest.mark.parametrize("run", ["../x", "a/b", "/x", ".x", "x\n", "x y", "X", "..", "", "é", "a\\b", "a" * 65])
def test_run_name_that_is_no_plain_name_is_refused(run: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig(run=run)


def test_run_name_of_the_command_line_cannot_lead_elsewhere(tmp_path: Path) -> None:
    """They need not pass the configuration."""
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "head.json").write_text('{"schema": 1}')
    for run in ("../../victim", "/victim", "x/../../../victim"):
        with pytest.raises(BadInput, match="store key"):
            verify(store, run)


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/./b", "a/../b", "a\x00b", "a\nb", "", "/", "."])
@pytest.mark.parametrize("url", ["folder", "s3://bucket/prefix"])
def test_store_refuses_keys_that_lead_elsewhere(tmp_path: Path, url: str, key: str) -> None:
    store = open_store(str(tmp_path) if url == "folder" else url)
    for use in (store.read, store.size, store.delete, store.uri, store.list, lambda k: store.create(k, b"")):
        with pytest.raises(BadInput, match="store key"):
            use(key)


@pytest.mark.parametrize("field", ["stage", "object_id", "writer"])
@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "a\x00"])
def test_job_with_names_that_lead_elsewhere_is_refused(tmp_path: Path, field: str, name: str) -> None:
    """They name folders and modules, and machines that join a run read them from its store."""
    fields = json.loads(json.dumps(job(tmp_path).fields()))
    assert Job.from_fields(fields) == job(tmp_path)
    with pytest.raises(BadInput, match=f"job, {field}"):
        Job.from_fields(fields | {field: name})


@pytest.mark.parametrize("name", ["../x", "a/../../x"])
def test_s3_object_with_a_name_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Names on S3 are any text."""

    monkeypatch.setattr(S3Store, "find_files", lambda self, start: {f"{start}/{name}": RemoteFile(1, "x")})
    for field in ("model", "dataset"):
        with pytest.raises(
            BadInput, match=f"{field} names .*, which holds an object .* names that stay inside the folder"
        ):
            s3_files.list_s3("s3://bucket/folder", field)


def test_link_in_the_cache_stays_inside_its_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the hostile names: what an honest manifest gives."""
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = RemoteStore(tmp_path / "store")
    folder = fetch.fetch_folder(store, published(store, tmp_path).object_id, "policy")
    assert folder.is_relative_to(cache_folder() / "objects")
    assert os.listdir(folder) == ["config.json"]
