"""`spinreg verify` finds what is not as it was committed, and takes nothing else for damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinreg_core.errors import StoreRefused
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs import objects
from spinreg_core.runs.plans import policy_object
from spinreg_core.store import documents
from spinreg_core.store.folder import FolderStore
from tests.support.repairs import repair
from tests.support.toy_runs import (
    advance,
    config,
    outcome,
)
from tests.support.unprivileged import as_nobody
from tests.support.watched_store import Altered, head_of

pytestmark = pytest.mark.usefixtures("quick")


def test_verify_finds_an_edited_manifest_and_an_unlisted_file(store: FolderStore) -> None:
    """Both would be read: an input that is gone hides what depends on it, a strange file is loaded with a policy."""
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    key = objects.manifest_key(train)
    record = objects.require_manifest(store, train)
    record.inputs = {}
    store.write(key, documents.dump(record))
    policy = next(e.key for e in record.files if "/policy/" in e.key).rpartition("/")[0]
    store.write(f"{policy}/.DS_Store", b"strange")
    found = verify(store, "a")
    assert found.damaged == [train]
    assert {(problem.file, problem.found) for problem in found.problems} == {
        (key, "other content than its sum is of"), (f"{policy}/.DS_Store", "a file that no manifest lists"),
    }  # fmt: skip
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_verify_counts_an_unreadable_file_as_damage(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    keys = [entry.key for entry in objects.require_manifest(store, train).files]
    policy = next(key for key in keys if "/policy/" in key)
    other = next(key for key in keys if "/policy/" not in key)
    for key in (policy, other):
        (store.root / key).unlink()
        (store.root / key).symlink_to(store.root / key)  # root may read anything but this
    found = {problem.file: problem.found for problem in verify(store, "a").problems}
    assert found.keys() == {policy, other, policy.rpartition("/")[0]}, "its folder cannot be listed either"
    assert found[policy].startswith("what cannot be read ([Errno")
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_verify_names_an_unreadable_manifest_and_its_dependents(store: FolderStore) -> None:
    advance(store, config("a"), 2)
    before = outcome(store, "a")
    train = policy_object(head_of(store, "a"), 1)
    path = store.root / objects.manifest_key(train)
    path.unlink()
    path.mkdir()
    result = verify(store, "a")
    (problem,) = result.problems
    assert (problem.file, problem.expected) == (
        objects.manifest_key(train), "what spinreg wrote there; remove it before --repair",
    )  # fmt: skip
    assert result.dependents[train]
    path.rmdir()
    repair(store, "a")
    assert verify(store, "a").problems == []
    assert outcome(store, "a") == before


def test_verify_without_rights_raises_instead_of_reporting_damage() -> None:
    """Another user's repair would make sound objects again."""

    def fill(folder: Path) -> None:
        store = FolderStore(folder)
        advance(store, config("a"), 1)
        for path in folder.rglob("policy/*"):
            path.chmod(0)

    with as_nobody(fill) as folder, pytest.raises(StoreRefused, match="Permission denied"):
        verify(FolderStore(folder), "a")


def test_verify_of_a_file_removed_while_it_is_read_reports_no_file(store: FolderStore) -> None:
    """As the checkpoints of a training do, which are removed when there are newer ones."""
    advance(store, config("a"), 1)
    key = objects.require_manifest(store, policy_object(head_of(store, "a"), 1)).files[0].key

    def gone(asked: str) -> int | None:
        size = store.size(asked)
        if asked == key:
            (store.root / key).unlink(missing_ok=True)
        return size

    (problem,) = verify(Altered(store, size=gone), "a").problems
    assert (problem.file, problem.found) == (key, "no file")
