"""A rank's eye on the others: one that stands still while this one runs is found, and all of them together are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spinreg_core.runtime.failures import is_secondary_failure, root_failure
from spinreg_core.runtime.rank_watch import _LATER_SECONDS, POLL_SECONDS, RankWatch
from spinreg_core.store.transfers import track_transfer

POLLS = int((1 + _LATER_SECONDS) / POLL_SECONDS)  # of a silence that is still allowed, with a timeout of one second


def test_a_silent_rank_is_recorded_in_its_own_name(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    for _ in range(3 * POLLS):
        assert not watch.should_exit()
        assert not other.should_exit()
    for _ in range(POLLS):
        assert not watch.should_exit()
    assert any(watch.should_exit() for _ in range(4))
    entry = json.loads((tmp_path / "failure-1.json").read_text())
    assert entry["message"].startswith("error: rank 1 has not run for 6 s (resources.collective_timeout_seconds: 1)")
    assert not is_secondary_failure(entry["message"])
    assert root_failure(tmp_path, {0: -9}) == (1, entry["message"])  # the one that ended of itself is not at fault


def test_ranks_that_were_all_suspended_blame_no_rank(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    assert not watch.should_exit()
    for file in (watch.file, other.file):
        os.utime(file, (1, 1))  # an hour passes, and nobody polls
    with track_transfer("the store"):
        assert not watch.should_exit()
    assert not watch.should_exit()
    assert not other.should_exit()


def test_rank_watch_finished_rank_is_not_reported(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    other.finished()
    assert not any(watch.should_exit() for _ in range(3 * POLLS))
    assert not other.file.exists()


def test_rank_watch_stalled_transfer_is_recorded_with_its_stack(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 0, 1.0)
    with track_transfer("storing a file") as moved:
        for _ in range(10):
            assert not watch.should_exit()
            moved(1)
        polls = 0
        while not watch.should_exit():
            polls += 1
        assert polls == pytest.approx(1 / POLL_SECONDS, abs=1.1)
    message = json.loads((tmp_path / "failure-0.json").read_text())["message"]
    assert message.startswith("error: rank 0: storing a file made no progress for 2 s (resources")
    assert "in test_rank_watch_stalled_transfer" in message
    assert not is_secondary_failure(message)
    assert "in test_rank_watch_stalled_transfer" in (tmp_path / "stack-0.txt").read_text()


def test_a_rank_that_has_finished_does_not_come_back(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 0, 1.0)
    watch.finished()
    assert not watch.should_exit()
    assert not watch.file.exists()


def test_rank_watch_with_a_failing_file_system_ends_nothing(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 0, 1.0)
    # Touching a file below another file fails, and not as for one that is gone.
    watch.file = watch.file / "alive-0"
    assert not watch.should_exit()
    (tmp_path / "failure-1.json").write_text("{}")
    assert watch.should_exit()
