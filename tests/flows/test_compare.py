"""How a comparison ends: of all its members, of those that came to their end, or of none. Its members are finished runs
that a test writes; with a real one that fails: tests/e2e/test_smoke.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import compare
from flows import grid_runner as members
from flows.grid_runner import Progress, run_here
from spinreg_core.comparison.grid import Member
from spinreg_core.config import RunConfig
from spinreg_core.errors import SpinregError, StageFailed
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.finished_runs import make_run

ALPHA = {"plain": 1.0, "half": 0.5, "base": 0.0}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for module, names in ((members, ["show_table"]), (compare, ["show_table", "show_markdown", "flush"])):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(compare, "wait_for_server", lambda *_: True)
    monkeypatch.setattr(compare, "run_log", lambda: print)
    monkeypatch.setattr(members, "run_log", lambda: print)
    return open_store(str(tmp_path / "store"))


def make(store: Store, folder: Path, name: str) -> RunConfig:
    return make_run(store, folder / name, name, [-0.1], objective={"alpha": ALPHA[name]})


def run(
    store: Store, folder: Path, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, str], list[str], Any]:
    """Why members failed, which flow runs began, and what the comparison returns. `plain` is there from the start."""
    made = [Member(make(store, folder, "plain"), 1)]
    made += [Member(RunConfig.model_validate({"run": name, "objective": {"alpha": ALPHA[name]}}), 1)
             for name in ("half", "base")]  # fmt: skip
    begun = []

    def flow(_flow: Any, **parameters: Any) -> None:
        begun.append(parameters["run"])
        if parameters["run"] in failing:
            raise StageFailed("out of luck")
        make(store, folder, parameters["run"])

    monkeypatch.setattr(members, "nested", flow)
    failures = run_here(store, made, Progress(store, "g", made), lambda: None)
    return failures, begun, lambda: compare._end(store, "g", made, failures, "plain")


def test_one_that_fails_ends_no_other_and_leaves_it_incomplete(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, begun, end = run(store, tmp_path, {"half"}, monkeypatch)
    assert failures == {"half": "out of luck"}
    assert begun == ["half", "base"], "what was complete is left alone, what comes after one that failed is run"
    state = end()
    assert (state.type.value, state.name) == ("COMPLETED", "Incomplete")
    assert state.message == "2 of 3 members compared; failed: half"
    assert state.data["runs"] == ["plain", "base"]
    assert state.data["failed"] == failures
    data = json.loads(store.read("comparisons/g/report.json") or b"")
    assert [one["run"] for one in data["runs"]] == ["plain", "base"]
    assert any("half (out of luck" in note for note in data["notes"])


def test_all_of_them(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, begun, end = run(store, tmp_path, set(), monkeypatch)
    assert (failures, begun) == ({}, ["half", "base"])
    assert end()["runs"] == ["plain", "half", "base"], "no state of its own: Completed"


def test_with_one_alone_there_is_nothing_to_compare(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, _, end = run(store, tmp_path, {"half", "base"}, monkeypatch)
    assert failures.keys() == {"half", "base"}
    with pytest.raises(SpinregError, match=r"only 1 members finished.*\n  - half: out of luck\n  - base: out of"):
        end()
