"""Stored documents come back as they were: undeclared fields, kinds of numbers and absent fields included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.errors import Damaged
from spinreg_core.runs.head import Head
from spinreg_core.runs.manifest import Manifest
from spinreg_core.store import documents
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore

KEY = "objects/train-1/manifest.json"
FILE = {"name": "f", "key": "objects/train-1/data/w/f", "size": 3, "sha256": "0" * 64}
MANIFEST = {
    "schema": 1, "object_id": "train-1", "stage": "train", "round": 1, "files": [FILE], "inputs": {"previous": None},
    "metrics": {"loss": 1, "rate": 1.0}, "seconds": 2, "versions": {}, "writer": "w", "created": "now", "key": {"a": 1},
}  # fmt: skip
HEAD = {
    "schema": 1, "run": "r", "advances": [{"by": "x", "from": 0, "to": 1, "done": True}], "rounds": [],
    "lease": {"epoch": 1, "holder": None, "beat": 0, "seconds": 600},
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "store")


def again(store: Store, kind: type[documents.Document], document: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a document after it was read and written again."""
    raw = json.dumps(document).encode()
    return dict(json.loads(documents.dump(documents.parse(store, KEY, raw, kind))))


@pytest.mark.parametrize(("kind", "document"), [(Manifest, MANIFEST), (Head, HEAD)])
def test_document_read_and_written_again_is_the_same(
    store: Store, kind: type[documents.Document], document: dict[str, Any]
) -> None:
    found = again(store, kind, document)
    assert found == document
    assert json.dumps(found, sort_keys=True) == json.dumps(document, sort_keys=True), "1 stays 1 and 1.0 stays 1.0"


def test_undeclared_fields_are_kept_at_every_level(store: Store) -> None:
    document = MANIFEST | {"new": {"deep": [1, 2.0]}, "files": [FILE | {"mode": 420}]}
    assert again(store, Manifest, document) == document
    head = HEAD | {"lease": HEAD["lease"] | {"colour": "red"}}  # type: ignore[operator]
    assert again(store, Head, head) == head


def test_sum_of_a_manifest_survives_reading_and_removal(store: Store) -> None:
    manifest = documents.parse(store, KEY, json.dumps(MANIFEST | {"new": 1}).encode(), Manifest)
    manifest.sum = documents.digest(manifest)
    read = documents.parse(store, KEY, documents.dump(manifest), Manifest)
    assert documents.digest(read) == manifest.sum
    removed = {"marked": False, "why": "a rule", "at": "now", "keys": [FILE["key"]]}
    read = documents.parse(store, KEY, json.dumps(documents.fields(read) | {"removed": removed}).encode(), Manifest)
    assert documents.digest(read) == manifest.sum
    read.inputs = {}
    assert documents.digest(read) != manifest.sum


def test_absent_optional_fields_stay_absent_after_a_change(store: Store) -> None:
    head = documents.parse(store, KEY, json.dumps(HEAD).encode(), Head)
    assert (head.base, head.repair, head.advances[0].ended) == (None, None, None)
    head.base = "base-1"
    head.repair = None
    found = json.loads(documents.dump(head))
    assert found == HEAD | {"base": "base-1"}


def test_manifest_without_a_required_field_is_damaged(store: Store) -> None:
    for name in ("files", "object_id", "inputs", "stage", "writer", "metrics"):
        with pytest.raises(Damaged, match=name):
            again(store, Manifest, {field: value for field, value in MANIFEST.items() if field != name})


def test_manifest_with_a_file_of_another_object_is_damaged(store: Store) -> None:
    with pytest.raises(Damaged, match="objects/train-2"):
        again(store, Manifest, MANIFEST | {"files": [FILE | {"key": "objects/train-2/data/w/f"}]})
