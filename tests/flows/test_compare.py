"""The end of a comparison: with all members, with the complete ones, or with too few. Members are runs that a test
writes; tests/e2e/test_smoke.py has a real member that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.compare import compare_complete, end_state
from flows.grid_runner import Progress, run_here
from spinreg_core.comparison.grid import Member
from spinreg_core.config import RunConfig
from spinreg_core.errors import SpinregError, StageFailed
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.builders import make_config
from tests.support.finished_runs import make_run

ALPHA = {"plain": 1.0, "half": 0.5, "base": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def make(store: Store, folder: Path, name: str) -> RunConfig:
    return make_run(store, folder / name, name, [-0.1], objective={"alpha": ALPHA[name]})


def run(store: Store, folder: Path, failing: set[str]) -> tuple[dict[str, str], list[str], Any]:
    """Return reasons of failed members, the runs that were started, and the end. `plain` is complete from the start."""
    members = [Member(make(store, folder, "plain"), 1)]
    members += [Member(make_config(run=name, objective__alpha=ALPHA[name]), 1) for name in ("half", "base")]
    started = []

    def advance(member: Member) -> None:
        started.append(member.run)
        if member.run in failing:
            raise StageFailed("out of luck")
        make(store, folder, member.run)

    progress = Progress(store, "g", members, table=lambda *_: None)
    failures = run_here(store, members, progress, check=lambda: None, advance=advance)

    def end() -> Any:
        _, summary = compare_complete(store, "g", members, failures, "plain")
        return end_state(summary, len(members))

    return failures, started, end


def test_compare_failed_member_ends_no_other_and_leaves_it_incomplete(store: Store, tmp_path: Path) -> None:
    failures, started, end = run(store, tmp_path, {"half"})
    assert failures == {"half": "out of luck"}
    assert started == ["half", "base"], "complete members are skipped, and those after a failed one run"
    state = end()
    assert (state.type.value, state.name) == ("COMPLETED", "Incomplete")
    assert state.message == "2 of 3 members compared; failed: half"
    assert state.data["runs"] == ["plain", "base"]
    assert state.data["failed"] == failures
    data = json.loads(store.read("comparisons/g/report.json") or b"")
    assert [one["run"] for one in data["runs"]] == ["plain", "base"]
    assert any("half (out of luck" in note for note in data["notes"])


def test_compare_all_members_returns_the_summary(store: Store, tmp_path: Path) -> None:
    failures, started, end = run(store, tmp_path, set())
    assert (failures, started) == ({}, ["half", "base"])
    assert end()["runs"] == ["plain", "half", "base"], "no state of its own: Completed"


def test_compare_one_complete_member_is_an_error(store: Store, tmp_path: Path) -> None:
    failures, _, end = run(store, tmp_path, {"half", "base"})
    assert failures.keys() == {"half", "base"}
    with pytest.raises(SpinregError, match=r"only 1 members finished.*\n  - half: out of luck\n  - base: out of"):
        end()
