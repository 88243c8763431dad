"""The command `spinreg gc`, on folders, links and S3."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest

from flows.cli import main
from spinreg_core.errors import StoreRefused
from spinreg_core.maintenance import gc as removal
from spinreg_core.maintenance.gc import find_removable
from spinreg_core.maintenance.retention import store_needs
from spinreg_core.runs.plans import policy_object
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from tests.support.servers import S3Server
from tests.support.toy_runs import (
    advance,
    config,
    content,
    littered,
    make_old,
    outcome,
)
from tests.support.watched_store import gc, head_of, sound

pytestmark = pytest.mark.usefixtures("quick")
LEAN = {"policies": 1, "generations": "needed"}


def test_gc_of_a_store_without_runs_removes_nothing(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Its runs may have been lost."""
    advance(store, config("a"), 1)
    shutil.rmtree(store.root / "runs")
    make_old(store.root)
    before = content(store)
    assert main(["gc", "--delete", "--store", str(store.root)]) == 0
    assert "there is no run here" in capsys.readouterr().out
    assert content(store).keys() >= {key for key in before if "/parts/step" not in key and "step-" not in key}


def test_gc_command_removes_the_listed_objects(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    littered(store)
    before = content(store)
    place = ["--store", str(store.root)]
    assert main(["gc", *place]) == 0
    listed = capsys.readouterr().out
    assert main(["gc", "--json", *place]) == 0
    document = json.loads(capsys.readouterr().out)
    assert content(store) == before
    assert len(store.unfinished()) == 1
    for words in ("train of round 1 of a, b: checkpoints of a finished stage", "train of round 1", "no run knows it",
                  "generate of round 2 of a: keep.generations: needed", "a write that never ended, 8 days old",
                  "would be removed", "--delete removes it"):  # fmt: skip
        assert words in listed, words
    assert document["removed"] is False
    keys = {key for item in document["items"] for key in item["keys"]}
    assert document["bytes"] == sum(store.size(key) or 0 for key in keys)
    assert main(["gc", "--delete", *place]) == 0
    assert "removed from" in capsys.readouterr().out
    assert keys == (before.keys() | {"objects/.tmp-x"}) - content(store).keys()
    assert main(["gc", *place]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_command_applies_the_rules_it_is_given(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    for run, seed in (("a", 1), ("b", 2)):
        advance(store, config(run, seed=seed), 3)
    place = ["--store", str(store.root), "--json"]
    assert main(["gc", "--run", "a", "-p", "keep.policies=2", *place]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    assert item["object"] == policy_object(head_of(store, "a"), 1)
    assert main(["gc", "--run", "nope", *place]) == 65
    assert "one of the runs of" in capsys.readouterr().err
    assert main(["gc", "-p", "keep.policies=0", *place]) == 65
    assert "keep.policies: found 0" in capsys.readouterr().err
    assert main(["gc", "-p", "seed=0", *place]) == 65
    assert "fields of the group keep" in capsys.readouterr().err


@pytest.mark.slow
def test_gc_on_s3_removes_the_same(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_server.url(uuid.uuid4().hex))
    advance(store, config("a", keep=LEAN), 2)
    expected = outcome(store, "a")
    for key in ("objects/x/data/w/f", "of-another/program"):
        store._run("beginning an upload", "create_multipart_upload", Key=store._key(key))  # type: ignore
    before = content(store)
    needs = store_needs(store)
    items = find_removable(store, needs)
    assert content(store) == before
    assert not [item for item in items if item.kind == "upload"], "it may still be under way"
    monkeypatch.setattr(removal, "GRACE_SECONDS", -60.0)
    gone = gc(store)
    assert [item.what.partition("?")[0] for item in gone if item.kind == "upload"] == ["objects/x/data/w/f"]
    assert [entry.key.partition("?")[0] for entry in store.unfinished()] == ["of-another/program"]
    assert "keep.policies: 1" in {item.why for item in gone}
    assert sound(store)
    assert gc(store) == []
    advance(store, config("b"), 2)
    assert outcome(store, "b") == expected
    advance(store, config("a", keep=LEAN), 3)
    assert sound(store)


def test_gc_with_a_run_behind_a_link_keeps_its_objects(store: FolderStore, tmp_path: Path) -> None:
    """Before, it was not seen, and `spinreg gc --delete` removed its objects."""
    advance(store, config("a"), 2)
    advance(store, config("b", seed=7), 1)
    gc(store)
    before = content(store)
    (store.root / "runs/a").rename(tmp_path / "elsewhere")
    (store.root / "runs/a").symlink_to(tmp_path / "elsewhere")
    make_old(store.root)
    assert gc(store) == []
    assert content(store).keys() == before.keys()
    assert sound(store)
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    with pytest.raises(StoreRefused, match="links that lead somewhere"):
        gc(store)
    (tmp_path / "elsewhere").mkdir()  # a place where no file system is mounted
    with pytest.raises(StoreRefused, match="a link to an empty folder"):
        gc(store)
    (tmp_path / "elsewhere").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "elsewhere")
    assert content(store).keys() == before.keys()


def test_gc_leaves_objects_behind_links_alone(store: FolderStore, tmp_path: Path) -> None:
    """It may be another store's, or this one's own by another name."""
    advance(store, config("a"), 2)
    gc(store)
    before = content(store)
    other = FolderStore(tmp_path / "other")
    shutil.copytree(store.root / "runs", other.root / "runs")
    (other.root / "objects").mkdir()
    for folder in (store.root / "objects").iterdir():
        (other.root / "objects" / folder.name).symlink_to(folder)
    needs = store_needs(other, None, LEAN)
    assert [item for item in find_removable(other, needs) if item.kind != "upload"] == []
    assert sum("lies behind a link" in note for note in needs.notes) == len(list((store.root / "objects").iterdir()))
    data = next((store.root / "objects").glob("train-*/data"))
    (data / "e0000-copy").symlink_to(next(data.iterdir()))
    make_old(store.root)
    gc(store)
    (data / "e0000-copy").unlink()
    assert content(store) == before


def test_gc_takes_an_empty_run_folder_for_a_mount_point(store: FolderStore, tmp_path: Path) -> None:
    advance(store, config("a"), 1)
    advance(store, config("b", seed=7), 1)
    gc(store)
    before = content(store).keys()
    shutil.move(store.root / "runs/a", tmp_path / "elsewhere")
    (store.root / "runs/a").mkdir()
    make_old(store.root)
    assert gc(store) == []
    assert "runs/a has no head.json" in store_needs(store).notes[0]
    shutil.rmtree(store.root / "runs/a")
    shutil.move(tmp_path / "elsewhere", store.root / "runs/a")
    assert content(store).keys() == before
