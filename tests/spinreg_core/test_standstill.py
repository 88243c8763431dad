"""Standing still: what moves does not, nor what nobody waits for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from spinreg_core.standstill import awaiting, moving, standing_still
from spinreg_core.store import PART_BYTES, FolderStore


def test_seconds_count_from_the_last_byte_and_the_innermost_operation_counts() -> None:
    assert standing_still() is None
    with moving("outer"), moving("inner") as moved:
        time.sleep(0.3)
        still = standing_still()
        assert still is not None
        assert still[0] == "inner"
        assert still[1] >= 0.3
        moved(1)
        still = standing_still()
        assert still is not None
        assert still[1] < 0.2
    assert standing_still() is None


def test_another_thread_counts_while_it_is_waited_for() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with moving("of the thread"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert standing_still() is None
    with awaiting(thread):
        still = standing_still()
        assert still is not None
        assert (still[0], still[2]) == ("of the thread", thread)
    assert standing_still() is None
    leave.set()
    thread.join()


def test_every_part_of_a_file_counts_as_movement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * PART_BYTES + 1))
    store, told = FolderStore(tmp_path / "store"), list[int]()
    monkeypatch.setattr("spinreg_core.standstill._Operation.moved", lambda _self, n=0: told.append(n))
    store.upload(tmp_path / "file", "a/key")
    store.download("a/key", tmp_path / "back")
    assert told == 2 * [PART_BYTES, PART_BYTES, 1]
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
