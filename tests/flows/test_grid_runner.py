"""Which member is started when, by what the server says of flow runs. With a real one: test_compare_grid.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from flows import grid_runner as members
from flows.grid_runner import Progress, run_on_pool
from spinreg_core.comparison.grid import Member, members_of
from spinreg_core.errors import BadInput, StoreFailed, StoreRefused
from spinreg_core.runs.head import ROUND_STAGES
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

BASE: dict[str, Any] = {"until_round": 1, "model": "random:tiny"}


class Server:
    """Flow runs by id, each with what is told when it has ended; every turn of the loop does one of `turns`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.store = store
        self.runs: dict[UUID, Any] = {}
        self.ended: dict[UUID, str | None] = {}
        self.started: list[str] = []
        self.turns: list[Callable[[], None]] = []
        monkeypatch.setattr(members, "require_other_pool", lambda deployment: uuid4())
        monkeypatch.setattr(members, "_ended", lambda of: {one: self.ended[one] for one in of if one in self.ended})
        monkeypatch.setattr(members, "_under_way", self.under_way)
        monkeypatch.setattr(members, "_start", self.start)
        monkeypatch.setattr(members, "show_table", lambda *_: None)
        monkeypatch.setattr(members.time, "sleep", lambda _: self.turns.pop(0)())

    def under_way(self, _deployment: UUID, _store: Store) -> dict[str, Any]:
        return {run.run: run for run in self.runs.values() if run.id not in self.ended}

    def add(self, member: Member, *, scheduled: bool = False, parameters: dict[str, Any] | None = None) -> UUID:
        state = SimpleNamespace(is_scheduled=lambda: scheduled)
        one = SimpleNamespace(id=uuid4(), name="some-name", run=member.run, state=state,
                              parameters=member.parameters if parameters is None else parameters)  # fmt: skip
        self.runs[one.id] = one
        return one.id

    def start(self, _deployment: str, member: Member, _attempt: int) -> Any:
        self.started.append(member.run)
        return self.runs[self.add(member)]

    def of(self, member: Member) -> UUID:
        return next(one for one in reversed(self.runs) if self.runs[one].run == member.run)

    def make(self, member: Member, *, last: bool = True) -> None:
        """All of the member's rounds, and the end of its flow run."""
        with hold_lease(self.store, member.config, "tester") as session:
            session.begin_advance("tester", None, 1)
            session.commit_inputs("base-x", f"data-{member.config.seed}")
            session.commit(0, "evaluate", "evaluate-0")
            for stage in ROUND_STAGES if last else ROUND_STAGES[:-1]:
                session.commit(1, stage, f"{stage}-1")
            session.finish_advance()
        self.ended[self.of(member)] = None

    def run(self, all_: list[Member]) -> dict[str, str]:
        found = run_on_pool(self.store, all_, "spin/iterate", Progress(self.store, "g", all_), lambda: None)
        assert not self.turns, "it ended before its time"
        return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    return Server(monkeypatch, open_store(str(tmp_path / "store")))


def grid(server: Server, **more: Any) -> list[Member]:
    return members_of("g", BASE | {"store": server.store.url}, **{"alpha": [1, 0], "history": [1], **more})


def test_the_second_waits_for_what_the_first_makes(server: Server) -> None:
    one, other = grid(server)
    server.turns = [
        lambda: server.started == [one.run] and server.make(one),  # type: ignore[list-item]
        lambda: server.make(other),
    ]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


def test_one_that_fails_ends_no_other(server: Server) -> None:
    one, other = grid(server)
    server.turns = [lambda: server.ended.update({server.of(one): "Failed: out of luck"}), lambda: server.make(other)]
    assert server.run([one, other]) == {one.run: "Failed: out of luck; the store has nothing of it"}
    assert server.started == [one.run, other.run]


def test_a_failure_after_the_last_round_is_told(server: Server) -> None:
    one, other = grid(server)

    def fails() -> None:
        server.make(one)
        server.ended[server.of(one)] = "Failed: the judge was away"

    server.turns = [fails, lambda: server.make(other)]
    assert server.run([one, other]) == {one.run: "Failed: the judge was away"}


def test_what_is_under_way_is_waited_for_before_anybody_is_started(server: Server) -> None:
    one, other = grid(server)
    server.add(other)
    server.turns = [lambda: server.make(other), lambda: server.make(one)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run], "when the other had made what both need"


def test_a_flow_run_of_somebody_else_that_went_less_far_is_followed_by_ours(server: Server) -> None:
    one, other = grid(server, seeds=[0])
    theirs = server.add(one, parameters={"run": one.run, "rounds": 1})

    def ends() -> None:
        server.make(one, last=False)
        server.ended[theirs] = "Crashed: no heartbeat"

    server.turns = [ends, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


def test_a_queued_flow_run_of_an_earlier_configuration_is_refused(server: Server) -> None:
    one, other = grid(server)
    server.add(one, scheduled=True, parameters=one.parameters | {"seed": 7})
    with pytest.raises(BadInput, match=f"name: found flow run some-name .* which is to advance {one.run} with other"):
        server.run([one, other])
    assert server.started == []


def test_what_is_complete_is_left_alone(server: Server) -> None:
    one, other = grid(server)
    server.add(one)
    server.make(one)
    server.turns = [lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [other.run]


def test_a_server_that_is_away_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = grid(server)
    start, lost = members._start, [httpx.ConnectError("refused")]

    def once_lost(*given: Any) -> Any:
        if lost:
            raise lost.pop()
        return start(*given)

    monkeypatch.setattr(members, "_start", once_lost)
    server.turns = [lambda: None, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


@pytest.mark.parametrize("told", ["refuses", "is away"])
def test_a_store_that_refuses_ends_it_and_one_that_is_away_does_not(
    told: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = grid(server)
    look, errors = members.open_reason, [(StoreRefused if told == "refuses" else StoreFailed)(f"the store {told}")]

    def first_fails(*given: Any) -> str | None:
        if errors:
            raise errors.pop()
        return look(*given)

    monkeypatch.setattr(members, "open_reason", first_fails)
    if told == "refuses":
        with pytest.raises(StoreRefused, match="the store refuses"):
            server.run([one, other])
        return
    server.turns = [lambda: None, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}


def test_of_ours_that_came_to_its_end_this_machine_does_not_know_better(server: Server) -> None:
    """What it is measured with may be told only where it ran; what somebody else's leaves is followed by ours."""
    more = {"benchmarks": {"tasks": ["gsm8k"], "include_path": "/only/there"}}
    one, other = members_of("g", BASE | {"store": server.store.url} | more, alpha=[1, 0], history=[1])
    server.add(one)
    server.turns = [lambda: server.make(one), lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]
