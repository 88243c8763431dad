"""Commits in a folder, files in a bucket whose server knows no conditional writes."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from pathlib import Path

import pytest

from flows.cli import main
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput, Conflict, Damaged
from spinreg_core.maintenance import gc as removal
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.head import read_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store import documents
from spinreg_core.store import s3 as s3_store
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from spinreg_core.store.probe import require_conditional_writes
from tests.support.servers import S3Server


@pytest.fixture
def url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix on a server that overwrites whatever the condition."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    plain = s3_store.S3Store._put

    async def careless(self: s3_store.S3Store, key: str, data: bytes, **condition: str) -> str:
        return await plain(self, key, data)

    monkeypatch.setattr(s3_store.S3Store, "_put", careless)
    return s3_server.url(uuid.uuid4().hex)


def test_a_run_on_such_a_server(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="SPINREG_COMMITS"):
        require_conditional_writes(open_store(url))
    assert open_store(url).list("probes") == [], "nor is the probe left where it failed"
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(url)
    store.check()
    require_conditional_writes(store)
    (tmp_path / "out" / "policy").mkdir(parents=True)
    (tmp_path / "out" / "policy" / "weights").write_bytes(b"w" * 1000)
    config = RunConfig(run="r", store=url)
    with hold_lease(store, config, "one") as session:
        job = Job("train", "train-x", {}, url, session.writer(), 1, {}, config, tmp_path)
        objects.publish(store, job, tmp_path / "out", metrics={})
        session.commit(1, "train", "train-x")
    head = read_head(open_store(url), "r")
    assert head is not None
    assert head["rounds"] == [{"round": 1, "stages": {"train": "train-x"}}]
    assert (fetch.fetch_folder(store, "train-x", "policy") / "weights").read_bytes() == b"w" * 1000
    with pytest.raises(Conflict):
        store.create("objects/train-x/manifest.json", b"{}")

    in_bucket = s3_store.S3Store(url).list("objects")
    assert [key.rpartition("/")[2] for key in in_bucket] == ["weights"], "files alone"
    assert all(store.local_path(key) is None for key in in_bucket)
    everything = store.list("objects")
    assert sorted([*in_bucket, "objects/train-x/manifest.json"]) == everything
    assert [entry.key for entry in store.entries("objects")] == everything
    store.delete(in_bucket[0])
    assert store.size(in_bucket[0]) is None


def test_whoever_does_not_know_of_the_folder_is_told(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    open_store(url).check()
    assert s3_store.S3Store(url).read("commits.json") is None, "looking changes nothing"
    open_store(url).create("runs/r/head.json", b"{}")
    open_store(url).check()
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "another"))
    with pytest.raises(BadInput, match=r"SPINREG_COMMITS: found commits of .*another.*; expected .*shared"):
        open_store(url).check()
    monkeypatch.delenv("SPINREG_COMMITS")
    with pytest.raises(BadInput, match=r"whose commits lie in .*shared.*; expected SPINREG_COMMITS"):
        open_store(url).check()


@pytest.mark.parametrize("commits", [None, "shared"])
@pytest.mark.parametrize("found", [b'{"commi', b'{"mine": 1}', b'{"schema": 1, "mine": 1}'])
def test_a_marker_that_spinreg_did_not_write(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: str | None, found: bytes
) -> None:
    open_store(url).write("commits.json", found)
    if commits is not None:
        monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / commits))
    with pytest.raises(Damaged, match=r"commits\.json: found"):
        open_store(url).check()


def one_run(url: str, tmp_path: Path) -> list[str]:
    """A run with one object, old enough for gc; returns the keys of its objects."""
    store, config = open_store(url), RunConfig(run="r", store=url)
    (tmp_path / "out" / "policy").mkdir(parents=True)
    (tmp_path / "out" / "policy" / "weights").write_bytes(b"w" * 1000)
    with hold_lease(store, config, "one") as session:
        job = Job("train", "train-x", {}, url, session.writer(), 1, {}, config, tmp_path)
        objects.publish(store, job, tmp_path / "out", metrics={})
        session.commit(1, "train", "train-x")
    return store.list("objects")


COMMANDS = [["gc", "--delete"], ["status"], ["verify", "r"], ["report", "r"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_another_folder_for_an_empty_store(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Before, `spinreg gc --delete` saw files of no run, and removed them all."""
    monkeypatch.setattr(removal, "GRACE_SECONDS", 0.0)  # the store is old
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    before = one_run(url, tmp_path)
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "another"))
    assert main([*command, "--store", url]) == 65
    assert "SPINREG_COMMITS: found commits of" in capsys.readouterr().err
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    assert open_store(url).list("objects") == before


def test_gc_removes_what_no_run_knows_from_both(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the bucket have no path here, and are behind no link."""
    monkeypatch.setattr(removal, "GRACE_SECONDS", 0.0)
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    one_run(url, tmp_path)
    store = open_store(url)
    job = Job("train", "train-y", {}, url, "e1-y", 1, {}, RunConfig(run="r", store=url), tmp_path)
    objects.publish(store, job, tmp_path / "out", metrics={})
    assert main(["gc", "--delete", "--store", url]) == 0
    assert [key for key in store.list("objects") if key.startswith("objects/train-y/data")] == []
    assert [key for key in store.list("objects") if key.startswith("objects/train-x/data")] != []


def without_ids(url: str, folder: Path) -> None:
    """Make bucket and folder what an earlier version wrote."""
    (marker,) = folder.rglob("commits.json")
    s3_store.S3Store(url).write("commits.json", documents.dump({"schema": 1, "commits": str(marker.parent)}))
    marker.unlink()


@pytest.mark.parametrize(
    ("version", "mount"),
    [("now", "missing"), ("now", "empty"), ("now", "another's"), ("before", "missing"), ("before", "empty")],
)
def test_a_folder_that_is_not_mounted_is_not_taken_for_an_empty_one(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, mount: str
) -> None:
    """Before, a run could be started in the empty mount point, and then `spinreg gc --delete` removed the files of all
    the others."""
    monkeypatch.setattr(removal, "GRACE_SECONDS", 0.0)
    shared = tmp_path / "shared"
    monkeypatch.setenv("SPINREG_COMMITS", str(shared))
    before = one_run(url, tmp_path)
    if version == "before":
        without_ids(url, shared)
    shared.rename(tmp_path / "unmounted")
    if mount != "missing":
        shared.mkdir()
    if mount == "another's":
        folder = FolderStore(shared / url.removeprefix("s3://"))
        folder.create("commits.json", documents.dump({"schema": 1, "commits": folder.url, "id": "another"}))
    there = sorted(shared.rglob("*"))
    for command in COMMANDS:
        assert main([*command, "--store", url]) == 65
    with pytest.raises(BadInput, match=r"SPINREG_COMMITS: found .*shared.*; expected the folder .*mounted"):
        open_store(url).check()
    with pytest.raises(BadInput, match="mounted"):  # by a stage, which does not ask `check`
        open_store(url).create("runs/new/head.json", b"{}")
    assert sorted(shared.rglob("*")) == there
    if mount != "missing":
        shutil.rmtree(shared)
    (tmp_path / "unmounted").rename(shared)
    open_store(url).check()
    assert open_store(url).list("objects") == before


def test_folder_and_bucket_of_an_earlier_version_go_on_and_get_an_id(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    before = one_run(url, tmp_path)
    without_ids(url, tmp_path / "shared")
    store = open_store(url)
    store.check()
    assert read_head(store, "r") is not None
    assert b'"id"' not in (s3_store.S3Store(url).read("commits.json") or b""), "looking changes nothing"
    store.create("runs/new/head.json", b"{}")
    (marker,) = (tmp_path / "shared").rglob("commits.json")
    assert s3_store.S3Store(url).read("commits.json") == marker.read_bytes()
    assert "id" in json.loads(marker.read_bytes())
    open_store(url).check()
    assert store.list("objects") == before


def test_of_two_first_starts_with_different_folders_one_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found a bucket without a marker."""
    stores = []
    for name in ("one", "other"):
        monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / name))
        stores.append(open_store(url))
    one, other = stores
    plain = s3_store.S3Store.write

    def overwritten(self: s3_store.S3Store, key: str, data: bytes) -> None:
        plain(self, key, data)
        plain(self, key, documents.dump({"schema": 1, "commits": str(tmp_path / "other"), "id": "1"}))

    with monkeypatch.context() as patched:
        patched.setattr(s3_store.S3Store, "write", overwritten)
        with pytest.raises(BadInput, match=r"found commits of .*one.*; expected .*other"):
            one.create("runs/r/run.json", b"{}")
    assert one.read("runs/r/run.json") is None
    s3_store.S3Store(url).delete("commits.json")

    def late(self: s3_store.S3Store, key: str, data: bytes) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(s3_store.S3Store, "write", plain)
            one.create("probes/x", b"{}")  # reads back what it has written
        plain(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(s3_store.S3Store, "write", late)
        other.create("runs/r/run.json", b"{}")
    with pytest.raises(BadInput, match=r"found commits of .*one.*; expected .*other"):
        one.create("runs/r/run.json", b"{}")


def test_killed_between_folder_and_bucket_a_first_commit_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    with monkeypatch.context() as patched:
        patched.setattr(s3_store.S3Store, "write", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            open_store(url).create("runs/r/head.json", b"{}")
    assert s3_store.S3Store(url).read("commits.json") is None
    open_store(url).check()
    open_store(url).create("runs/r/head.json", b"{}")
    open_store(url).check()
    assert open_store(url).list("runs/") == ["runs/r/head.json"]


def test_a_bucket_with_runs_of_its_own_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(url).create("runs/old/head.json", b"{}")
    monkeypatch.setenv("SPINREG_COMMITS", str(tmp_path / "shared"))
    with pytest.raises(BadInput, match=r"runs/old/head\.json, a run whose commits lie in the bucket"):
        open_store(url).check()
    monkeypatch.setenv("SPINREG_COMMITS", "relative")
    with pytest.raises(BadInput, match="an absolute path"):
        open_store(url)
