"""`scripts/join_commits.py` brings the commits of a 0.1.0 store back into its bucket."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.cli import main
from scripts import join_commits
from spinreg_core.errors import BadInput, Conflict
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.head import read_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from tests.support.builders import make_config, make_job
from tests.support.servers import S3Server

DATA = re.compile(r"objects/[^/]+/data/")


@dataclass
class Split:
    """A store as 0.1.0 laid it out: `bucket` holds files and a marker, a folder below `shared` all other keys."""

    url: str
    bucket: Store
    shared: Path
    commits: FolderStore
    keys: list[str]


def one_run(store: Store, tmp_path: Path) -> None:
    """A run with one object, its report and a part."""
    config = make_config(run="r", store=store.url)
    (tmp_path / "out" / "policy").mkdir(parents=True)
    (tmp_path / "out" / "policy" / "weights").write_bytes(b"w" * 1000)
    with hold_lease(store, config, "one") as lease:
        job = make_job("train", tmp_path, config=config, writer=lease.writer())
        objects.publish(store, job, tmp_path / "out", metrics={})
        lease.commit(1, "train", "train-x")
    store.write("runs/r/report.html", b"<html>")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    url = str(tmp_path / "bucket")
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        url = server.url(uuid.uuid4().hex)
    bucket, whole = open_store(url), FolderStore(tmp_path / "whole")
    one_run(whole, tmp_path)
    shared = tmp_path / "shared"
    commits = FolderStore(shared / url.removeprefix("s3://") if url.startswith("s3://") else shared)
    keys = whole.list("objects/") + whole.list("runs/")
    for key in keys:
        if DATA.match(key):
            bucket.upload(whole.root / key, key)
        else:
            commits.create(key, whole.read(key) or b"")
    mark(bucket, commits, {"id": "5f"})
    return Split(url, bucket, shared, commits, keys)


def mark(bucket: Store, commits: FolderStore, identity: dict[str, str]) -> None:
    """Write the marker of the bucket, and with an id that of the folder, as 0.1.0 did."""
    marker = documents.dump({"schema": 1, "commits": commits.url} | identity)
    bucket.write("commits.json", marker)
    if identity:
        commits.write("commits.json", marker)
    else:
        commits.delete("commits.json")


def test_split_store_is_refused_and_the_script_is_named(split: Split, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput) as refused:
        open_store(split.url).check()
    assert str(refused.value) == (
        f"store {split.bucket.url} holds commits.json: its commits lie in the folder that SPINREG_COMMITS named; "
        f"run `python scripts/join_commits.py {split.bucket.url} FOLDER` once to copy them into it"
    )
    for command in (["gc", "--delete"], ["status"], ["verify", "r"], ["report", "r"]):
        assert main([*command, "--store", split.url]) == 65
        assert "scripts/join_commits.py" in capsys.readouterr().err
    assert [key for key in split.keys if DATA.match(key)] == split.bucket.list("objects/"), "nothing was removed"


@pytest.mark.parametrize("identity", [{"id": "5f"}, {}], ids=["id", "legacy"])
def test_join_commits_makes_the_store_whole(
    split: Split, identity: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(split.bucket, split.commits, identity)
    # The script works while the variable that the store refuses is still set.
    monkeypatch.setenv("SPINREG_COMMITS", str(split.shared))
    assert join_commits.main([split.url, str(split.shared)]) == 0
    monkeypatch.delenv("SPINREG_COMMITS")
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    store = open_store(split.url)
    store.check()
    assert store.list("objects/") + store.list("runs/") == split.keys
    head = read_head(store, "r")
    assert head is not None
    assert head.stage(1, "train") == "train-x"
    assert (fetch.fetch_folder(store, "train-x", "policy") / "weights").read_bytes() == b"w" * 1000
    assert store.read("commits.json") is None
    assert store.list("probes/") == []


def test_join_commits_is_done_once(split: Split) -> None:
    join_commits.join_commits(split.bucket, split.shared)
    split.commits.write("runs/r/report.html", b"later")
    assert "nothing was copied" in join_commits.join_commits(split.bucket, split.shared)
    assert split.bucket.read("runs/r/report.html") == b"<html>"


def test_join_commits_after_an_interruption_copies_the_rest(split: Split) -> None:
    key = "runs/r/head.json"
    split.bucket.create(key, split.commits.read(key) or b"")
    join_commits.join_commits(split.bucket, split.shared)
    split.bucket.check()
    assert split.bucket.list("objects/") + split.bucket.list("runs/") == split.keys


def test_join_commits_never_overwrites_other_content(split: Split, capsys: pytest.CaptureFixture[str]) -> None:
    split.bucket.create("runs/r/run.json", b"{}")
    with pytest.raises(Conflict, match=r"runs/r/run\.json"):
        join_commits.join_commits(split.bucket, split.shared)
    assert join_commits.main([split.url, str(split.shared)]) == 1
    assert "runs/r/run.json" in capsys.readouterr().err
    assert split.bucket.read("runs/r/run.json") == b"{}"
    assert split.bucket.read("commits.json") is not None, "the store stays refused"


def test_join_commits_accepts_the_folder_of_the_store_itself(split: Split) -> None:
    """A backup may be restored in another place."""
    split.commits.root.rename(split.shared.parent / "restored")
    join_commits.join_commits(split.bucket, split.shared.parent / "restored")
    assert split.bucket.list("runs/") == [key for key in split.keys if key.startswith("runs/")]


# The sixth combination cannot be told apart: a legacy marker has no id that another folder could lack.
@pytest.mark.parametrize(
    ("identity", "folder"),
    [({"id": "5f"}, "missing"), ({"id": "5f"}, "empty"), ({"id": "5f"}, "another"), ({}, "missing"), ({}, "empty")],
)
def test_join_commits_from_a_wrong_folder_changes_nothing(
    split: Split, identity: dict[str, str], folder: str, tmp_path: Path
) -> None:
    mark(split.bucket, split.commits, identity)
    if folder == "empty":
        (tmp_path / folder).mkdir()
    if folder == "another":
        other = FolderStore(tmp_path / folder)
        other.create("runs/x/head.json", b"{}")
        mark(FolderStore(tmp_path / "other bucket"), other, {"id": "6a"})
    with pytest.raises(BadInput, match=r"does not hold the commits of .*; name the folder with its commits, which was"):
        join_commits.join_commits(split.bucket, tmp_path / folder)
    assert split.bucket.list("runs/") == []
    assert split.bucket.read("commits.json") is not None


def test_join_commits_leaves_stores_below_other_prefixes_alone(split: Split) -> None:
    """The folder of a bucket holds the folders of its prefixes."""
    split.commits.create("prefix/runs/other/head.json", b"{}")
    join_commits.join_commits(split.bucket, split.shared)
    assert split.bucket.list("prefix/") == []


def test_join_commits_needs_a_server_with_conditional_writes(tmp_path: Path) -> None:
    class Overwriting(FolderStore):
        def create(self, key: str, data: bytes) -> str:
            self.write(key, data)
            return ""

    bucket, commits = Overwriting(tmp_path / "bucket"), FolderStore(tmp_path / "shared")
    commits.create("runs/r/head.json", b"{}")
    mark(bucket, commits, {"id": "5f"})
    with pytest.raises(BadInput, match="a folder store on a shared file system"):
        join_commits.join_commits(bucket, tmp_path / "shared")
    assert bucket.list("runs/") == []


def test_join_commits_runs_as_a_command(tmp_path: Path) -> None:
    script = [sys.executable, "scripts/join_commits.py", str(tmp_path), str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert "holds no commits.json" in run.stdout


def test_open_store_refuses_a_bucket_while_spinreg_commits_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINREG_COMMITS", "/shared")
    with pytest.raises(BadInput, match=r"SPINREG_COMMITS is set.*; remove it from the environment, after `python"):
        open_store("s3://bucket/prefix")
    open_store("/a/folder")
