"""The loop over rounds and stages, with stages that only commit, and with toy stages on a real store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spinreg_core.config import RunConfig, UntilConfig
from spinreg_core.errors import Damaged, SpinregError
from spinreg_core.runs import objects
from spinreg_core.runs.head import HELDOUT, Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import RunLease, hold_lease
from spinreg_core.runs.loop import StageResult, Steps, advance, do_stage, run_stages
from spinreg_core.runs.stages import STAGES, complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from tests.support import toy_runs
from tests.support.toy_runs import quick
from tests.support.watched_store import gc, head_of

__all__ = ["quick"]


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


class Recorder:
    """Steps of an advance that commit an object per stage, and record every call."""

    def __init__(self, lease: RunLease, *, commits: int = 99, ends_before: int = 99, measured: int = -1) -> None:
        self.lease, self.commits, self.ends_before, self.measured = lease, commits, ends_before, measured
        self.calls: list[str] = []
        self.said: list[str] = []

    def steps(self) -> Steps:
        return Steps(
            prepare=lambda: self.calls.append("prepare"),
            stages={stage: self.stage(stage) for stage in STAGES},
            run_round=self.run_round,
            measure=self.measure,
            why_ended=self.why_ended,
            show=lambda number: self.calls.append(f"show {number}"),
        )

    def stage(self, name: str) -> Callable[[int], None]:
        def call(number: int) -> None:
            self.calls.append(f"{name} {number}")
            self.lease.commit(number, name, f"{name}-{number}")

        return call

    def run_round(self, number: int) -> None:
        self.calls.append(f"round {number}")
        if number <= self.commits:
            run_stages(number, {stage: self.stage(stage) for stage in STAGES})

    def measure(self, number: int) -> bool:
        self.calls.append(f"measure {number}")
        return number == self.measured

    def why_ended(self) -> str | None:
        return "too far" if complete_round(self.lease.head) + 1 >= self.ends_before else None

    def advance(self, config: RunConfig, by: str) -> str | None:
        return advance(self.lease, config, by, self.steps(), self.said.append)

    def rounds(self) -> list[str]:
        return [call for call in self.calls if call.startswith("round")]


def make(rounds: int, **fields: object) -> RunConfig:
    return RunConfig.model_validate({"run": "a", "rounds": rounds, "resources": {"lease_seconds": 600}} | fields)


def test_advance_calls_its_steps_in_their_order(store: Store) -> None:
    with hold_lease(store, make(1), "test") as lease:
        recorder = Recorder(lease)
        assert recorder.advance(make(1), "a") is None
        assert recorder.calls == [
            "prepare", "generate-heldout 0", "evaluate 0", "measure 0", "show 0", "round 1", "generate 1",
            "mix-opponent 1", "train 1", "generate-heldout 1", "evaluate 1",
        ]  # fmt: skip
        assert complete_round(lease.head) == 1


def test_advance_measures_earlier_rounds_and_shows_new_results(store: Store) -> None:
    with hold_lease(store, make(2), "test") as lease:
        Recorder(lease).advance(make(2), "a")
        lease.finish_advance()
        later = Recorder(lease, measured=1)
        later.advance(make(1), "b")
        assert later.calls[:5] == ["prepare", "measure 0", "measure 1", "show 1", "measure 2"]
        assert later.rounds() == ["round 3"]


def test_advance_retried_by_its_caller_calls_the_same_rounds(store: Store) -> None:
    with hold_lease(store, make(2), "test") as lease:
        with pytest.raises(SpinregError):
            Recorder(lease, commits=1).advance(make(2), "a")
        retry = Recorder(lease)
        retry.advance(make(2), "a")
        assert retry.rounds() == ["round 1", "round 2"]
        again = Recorder(lease)
        again.advance(make(2), "a")
        assert again.rounds() == ["round 1", "round 2"]
        assert complete_round(lease.head) == 2


def test_advance_by_another_caller_finishes_the_recorded_one(store: Store) -> None:
    with hold_lease(store, make(3), "test") as lease:
        with pytest.raises(SpinregError):
            Recorder(lease, commits=1).advance(make(3), "a")
        other = Recorder(lease)
        other.advance(make(3), "b")
        assert other.rounds() == ["round 2", "round 3"]
        assert complete_round(lease.head) == 3


def test_advance_with_a_condition_that_holds_ends_and_records_it(store: Store) -> None:
    config = make(3, until={"kl_base_above": 3.0})
    with hold_lease(store, config, "test") as lease:
        recorder = Recorder(lease, ends_before=2)
        assert recorder.advance(config, "a") == "too far"
        assert recorder.rounds() == ["round 1"]
        assert "ends before round 2: too far" in recorder.said[-1]
        (found,) = lease.head.advances
        assert (found.done, found.ended) == (True, "too far")
        assert found.ended_by == UntilConfig(kl_base_above=3.0).model_dump(mode="json")


def test_advance_with_a_round_without_commits_raises(store: Store) -> None:
    with hold_lease(store, make(2), "test") as lease:
        recorder = Recorder(lease, commits=0)
        with pytest.raises(SpinregError, match="round 1 of run 'a' ended without its commits"):
            recorder.advance(make(2), "a")
        assert recorder.rounds() == ["round 1"]


# --- one stage -----------------------------------------------------------------------------------------


def do(store: Store, config: RunConfig, made_from: Head, stage: str, number: int) -> tuple[StageResult, list[str]]:
    """Run `do_stage` after the commits that another run made before it. Returns its result and what it started."""
    started: list[str] = []

    def start(job: Job, name: str) -> object:
        started.append(name)
        return toy_runs.ToyStages(store, toy_runs.digest_of)(job, name)

    with hold_lease(store, config, "test") as lease:
        assert made_from.base is not None
        assert made_from.data is not None
        lease.commit_inputs(made_from.base, made_from.data)
        for earlier in stages_of(number)[: stages_of(number).index(stage)]:
            lease.commit(number, earlier, str(made_from.stage(number, earlier)))
        return do_stage(store, lease, config, stage, number, start), started


@pytest.mark.usefixtures("quick")
def test_do_stage_with_an_object_of_its_fingerprint_takes_it_over(store: FolderStore) -> None:
    toy_runs.advance(store, toy_runs.config("a"), 0)
    head = head_of(store, "a")
    result, started = do(store, toy_runs.config("b"), head, "evaluate", 0)
    assert (result["reused"], started) == (True, [])
    assert head_of(store, "b").stage(0, "evaluate") == head.stage(0, "evaluate")
    assert result["uri"] == store.uri(f"objects/{head.stage(0, 'evaluate')}")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("evaluated", [True, False])
def test_do_stage_with_removed_files_runs_only_if_they_are_read(store: FolderStore, evaluated: bool) -> None:
    """Held-out answers are read by the evaluation, which the second configuration has to make itself."""
    toy_runs.advance(store, toy_runs.config("a", keep={"generations": "needed"}), 0)
    head = head_of(store, "a")
    assert str(head.stage(0, HELDOUT)) in {item.object_id for item in gc(store)}
    groups = {} if evaluated else {"evaluation": {"bootstrap": 100}}
    result, started = do(store, toy_runs.config("b", **groups), head, HELDOUT, 0)
    assert (result["reused"], started) == ((True, []) if evaluated else (False, ["round-0-generate-heldout"]))
    assert head_of(store, "b").stage(0, HELDOUT) == head.stage(0, HELDOUT)


@pytest.mark.usefixtures("quick")
def test_do_stage_with_a_committed_object_that_is_missing_raises(store: FolderStore) -> None:
    config = toy_runs.config("a")
    toy_runs.advance(store, config, 0)
    object_id = str(head_of(store, "a").stage(0, "evaluate"))
    store.delete(objects.manifest_key(object_id))
    with pytest.raises(Damaged, match="committed as round 0 evaluate, but not there"):
        do(store, config, head_of(store, "a"), "evaluate", 0)
