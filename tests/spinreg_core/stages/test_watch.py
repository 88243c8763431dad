"""A rank's eye on the others: one that stands still while this one runs is found, and all of them together are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

from spinreg_core.stages.failures import about_others, verdict
from spinreg_core.stages.watch import _LATER_SECONDS, POLL_SECONDS, RankWatch

POLLS = int((1 + _LATER_SECONDS) / POLL_SECONDS)  # of a silence that is still allowed, with a timeout of one second


def test_a_silent_rank_is_recorded_in_its_own_name(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    for _ in range(3 * POLLS):
        assert not watch.doomed()
        assert not other.doomed()
    for _ in range(POLLS):
        assert not watch.doomed()
    assert any(watch.doomed() for _ in range(4))
    entry = json.loads((tmp_path / "failure-1.json").read_text())
    assert entry["message"].startswith("error: rank 1 has not run for 6 s (resources.collective_timeout_seconds: 1)")
    assert not about_others(entry["message"])
    assert verdict(tmp_path, {0: -9}) == (1, entry["message"])  # the one that ended of itself is not at fault


def test_ranks_that_were_all_suspended_blame_nobody(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    assert not watch.doomed()
    for file in (watch.file, other.file):
        os.utime(file, (1, 1))  # an hour passes, and nobody polls
    assert not watch.doomed()
    assert not other.doomed()


def test_a_rank_at_its_end_is_not_missed(tmp_path: Path) -> None:
    watch, other = RankWatch(tmp_path, 0, 1.0), RankWatch(tmp_path, 1, 1.0)
    other.finished()
    assert not any(watch.doomed() for _ in range(3 * POLLS))
    assert not other.file.exists()
