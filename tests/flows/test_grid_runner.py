"""The order in which members start, by the state of their flow runs. With a real server: test_compare_grid.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from flows.grid_runner import Progress, run_on_pool
from spinreg_core.comparison.grid import Member, members_of
from spinreg_core.errors import BadInput, StoreFailed, StoreRefused
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.stages import stages_of
from spinreg_core.store.folder import FolderStore

BASE: dict[str, Any] = {"until_round": 1, "model": "random:tiny"}


class UnreliableStore(FolderStore):
    """A store in a folder whose next reads raise `errors`."""

    errors: list[Exception]

    def read(self, key: str) -> bytes | None:
        if self.errors:
            raise self.errors.pop()
        return super().read(key)


class Server:
    """Flow runs by id, and the failures of ended ones. Each turn of the loop does one of `turns`."""

    def __init__(self, store: UnreliableStore) -> None:
        self.store = store
        self.runs: dict[UUID, Any] = {}
        self.failures: dict[UUID, str | None] = {}
        self.started: list[str] = []
        self.turns: list[Callable[[], None]] = []
        self.errors: list[Exception] = []  # of the next requests to start a flow run

    def ended(self, ids: Sequence[UUID]) -> dict[UUID, str | None]:
        return {one: self.failures[one] for one in ids if one in self.failures}

    def under_way(self) -> dict[str, Any]:
        return {run.run: run for run in self.runs.values() if run.id not in self.failures}

    def add(self, member: Member, *, scheduled: bool = False, parameters: dict[str, Any] | None = None) -> UUID:
        state = SimpleNamespace(is_scheduled=lambda: scheduled)
        one = SimpleNamespace(id=uuid4(), name="some-name", run=member.run, state=state,
                              parameters=member.parameters if parameters is None else parameters)  # fmt: skip
        self.runs[one.id] = one
        return one.id

    def start(self, member: Member, attempt: int) -> Any:
        if self.errors:
            raise self.errors.pop()
        self.started.append(member.run)
        return self.runs[self.add(member)]

    def of(self, member: Member) -> UUID:
        return next(one for one in reversed(self.runs) if self.runs[one].run == member.run)

    def make(self, member: Member, *, last: bool = True) -> None:
        """Complete the member's rounds and its flow run."""
        with hold_lease(self.store, member.config, "tester") as session:
            session.begin_advance("tester", None, 1)
            session.commit_inputs("base-x", f"data-{member.config.seed}")
            for stage in stages_of(0):
                session.commit(0, stage, f"{stage}-0")
            for stage in stages_of(1) if last else stages_of(1)[:-1]:
                session.commit(1, stage, f"{stage}-1")
            session.finish_advance()
        self.failures[self.of(member)] = None

    def run(self, members: list[Member]) -> dict[str, str]:
        progress = Progress(self.store, "g", members, table=lambda *_: None)
        found = run_on_pool(
            self.store, members, self, progress, check=lambda: None, sleep=lambda _: self.turns.pop(0)()
        )
        assert not self.turns, "it ended before its time"
        return found


@pytest.fixture
def server(tmp_path: Path) -> Server:
    store = UnreliableStore(tmp_path / "store")
    store.errors = []
    return Server(store)


def grid(server: Server, **more: Any) -> list[Member]:
    return members_of("g", BASE | {"store": server.store.url}, **{"alpha": [1, 0], "history": [1], **more})


def test_run_on_pool_second_member_waits_for_objects_of_the_first(server: Server) -> None:
    one, other = grid(server)
    server.turns = [
        lambda: server.started == [one.run] and server.make(one),  # type: ignore[list-item]
        lambda: server.make(other),
    ]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


def test_run_on_pool_failed_member_ends_no_other(server: Server) -> None:
    one, other = grid(server)
    server.turns = [lambda: server.failures.update({server.of(one): "Failed: out of luck"}), lambda: server.make(other)]
    assert server.run([one, other]) == {one.run: "Failed: out of luck; the store has nothing of it"}
    assert server.started == [one.run, other.run]


def test_run_on_pool_reports_a_failure_after_the_last_round(server: Server) -> None:
    one, other = grid(server)

    def fails() -> None:
        server.make(one)
        server.failures[server.of(one)] = "Failed: the judge was away"

    server.turns = [fails, lambda: server.make(other)]
    assert server.run([one, other]) == {one.run: "Failed: the judge was away"}


def test_run_on_pool_waits_for_existing_flow_runs_first(server: Server) -> None:
    one, other = grid(server)
    server.add(other)
    server.turns = [lambda: server.make(other), lambda: server.make(one)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run], "when the other had made what both need"


def test_run_on_pool_starts_its_own_after_a_foreign_one_fell_short(server: Server) -> None:
    one, other = grid(server, seeds=[0])
    theirs = server.add(one, parameters={"run": one.run, "rounds": 1})

    def ends() -> None:
        server.make(one, last=False)
        server.failures[theirs] = "Crashed: no heartbeat"

    server.turns = [ends, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


def test_run_on_pool_refuses_a_queued_run_with_other_parameters(server: Server) -> None:
    one, other = grid(server)
    server.add(one, scheduled=True, parameters=one.parameters | {"seed": 7})
    with pytest.raises(BadInput, match=f"flow run some-name .* is about to advance {one.run} with other"):
        server.run([one, other])
    assert server.started == []


def test_run_on_pool_skips_complete_members(server: Server) -> None:
    one, other = grid(server)
    server.add(one)
    server.make(one)
    server.turns = [lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [other.run]


def test_run_on_pool_waits_for_a_server_that_is_away(server: Server) -> None:
    one, other = grid(server)
    server.errors = [httpx.ConnectError("refused")]
    server.turns = [lambda: None, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]


def test_run_on_pool_ends_when_the_store_refuses(server: Server) -> None:
    one, other = grid(server)
    server.store.errors = [StoreRefused("the store refuses")]
    with pytest.raises(StoreRefused, match="the store refuses"):
        server.run([one, other])


def test_run_on_pool_waits_for_a_store_that_is_away(server: Server) -> None:
    one, other = grid(server)
    server.store.errors = [StoreFailed("the store is away")]
    server.turns = [lambda: None, lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}


def test_run_on_pool_trusts_its_own_completed_flow_runs(server: Server) -> None:
    """Only the machine of a flow run may know the benchmarks; after a foreign flow run, one of ours follows."""
    more = {"benchmarks": {"tasks": ["gsm8k"], "include_path": "/only/there"}}
    one, other = members_of("g", BASE | {"store": server.store.url} | more, alpha=[1, 0], history=[1])
    server.add(one)
    server.turns = [lambda: server.make(one), lambda: server.make(one), lambda: server.make(other)]
    assert server.run([one, other]) == {}
    assert server.started == [one.run, other.run]
