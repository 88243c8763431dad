"""Heads of 0.1.0 name no held-out answers; the manifests of their evaluations do."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinreg_core.runs.head import HELDOUT, Head, Repair, RoundStage, head_key, read_head
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import manifest_key
from spinreg_core.store import documents
from spinreg_core.store.folder import FolderStore
from tests.support.builders import make_head


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """A store with a head of one round, and the manifest of the evaluation of the base."""
    store = FolderStore(tmp_path / "store")
    write_head(store, make_head(1))
    manifest = Manifest(
        object_id="evaluate-0", stage="evaluate", round=0, files=[], inputs={"heldout": "generate-x"}, metrics={},
        seconds=0.0, versions={}, writer="w", created="",
    )  # fmt: skip
    store.create(manifest_key("evaluate-0"), documents.dump(manifest))
    return store


def write_head(store: FolderStore, head: Head) -> None:
    for entry in head.rounds:
        entry.stages.pop(HELDOUT, None)
    store.write(head_key("demo"), documents.dump(head))


def named(store: FolderStore) -> list[str | None]:
    head = read_head(store, "demo")
    assert head is not None
    return [head.stage(number, HELDOUT) for number in (0, 1)]


def test_heldout_answers_are_those_that_the_evaluation_was_made_from(store: FolderStore) -> None:
    assert named(store) == ["generate-x", None]


@pytest.mark.parametrize("raw", [b"", b"{", b'{"schema": 1}', b'{"schema": 99}'])
def test_heldout_answers_of_an_unreadable_evaluation_stay_unnamed(store: FolderStore, raw: bytes) -> None:
    store.write(manifest_key("evaluate-0"), raw)
    assert named(store) == [None, None]


def test_heldout_answers_that_a_repair_has_opened_stay_open(store: FolderStore) -> None:
    repair = Repair(to=1, stages=[RoundStage(round=0, stage=HELDOUT)], replace={}, was={}, dependents={})
    write_head(store, make_head(1, repair=repair))
    assert named(store) == [None, None]
