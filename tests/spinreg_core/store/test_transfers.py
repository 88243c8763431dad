"""Registry of transfers: movement, and the threads that count."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from spinreg_core.store import folder
from spinreg_core.store.base import PART_BYTES
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.hashing import sha256_file
from spinreg_core.store.transfers import Transfer, main_thread_waits_for, track_transfer, watched_transfers


def test_end_of_an_inner_operation_moves_its_outer_one() -> None:
    assert watched_transfers() == []
    with track_transfer("outer"):
        with track_transfer("inner") as moved:
            (inner,) = watched_transfers()
            assert (inner.what, inner.moves) == ("inner", 0)
            moved(1)
            assert inner.moves == 1
        (outer,) = watched_transfers()
        assert (outer.what, outer.moves) == ("outer", 1)
    assert watched_transfers() == []


def test_transfer_of_an_awaited_thread_is_watched() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with track_transfer("of the thread"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert watched_transfers() == []
    with main_thread_waits_for(thread):
        (found,) = watched_transfers()
        assert (found.what, found.thread) == ("of the thread", thread)
    assert watched_transfers() == []
    leave.set()
    thread.join()


def test_every_part_of_a_file_moves_its_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * PART_BYTES + 1))
    store, told = FolderStore(tmp_path / "store"), list[int]()
    monkeypatch.setattr(Transfer, "moved", lambda _self, n=0: told.append(n))
    store.upload(tmp_path / "file", "a/key")
    store.download("a/key", tmp_path / "back")
    assert sha256_file(tmp_path / "back") == sha256_file(tmp_path / "file")
    assert [n for n in told if n] == 4 * [PART_BYTES, PART_BYTES, 1]


def test_copy_is_synced_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a large file would be synced at the end only, which would look like a hang."""
    synced: list[int] = []
    monkeypatch.setattr(folder, "SYNC_BYTES", 2 * PART_BYTES)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    (tmp_path / "file").write_bytes(bytes(5 * PART_BYTES))
    FolderStore(tmp_path).download("file", tmp_path / "copy")
    assert [size // PART_BYTES for size in synced] == [2, 4]
