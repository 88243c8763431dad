"""Two writers of one run, in every order in which their requests can reach the store (up to a number of switches).

The real code runs in two threads; each request to the store, and each look at the clock while waiting for a lease, is a
step, and a scheduler decides whose is next. A watcher's clock runs away at every look: to each writer the other may be
frozen, cut off from the store, or dead at any time, and come back at any time (so that patience, which only spares a
living holder, has no part here). With `kill`, one of them dies before one of its steps; with `lose` the reply to one of
their writes is lost, and what comes back says that somebody else was first. Orders are walked through depth first, with
at most so many switches away from a writer that could have gone on (Musuvathi and Qadeer, CHESS): without a bound there
are millions.

Held after every step: a head follows its predecessor (nothing committed is changed or dropped; the epoch never falls),
what is committed was committed by the holder of the lease under which it is written, and a manifest never changes. Both
writers mean to commit objects of the same names, as two flows of one run do; that a stage is not replaced by another
object is `test_head.py`'s.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import ResourcesConfig, RunConfig
from spinreg_core.errors import LeaseHeld, LeaseLost
from spinreg_core.runs import objects
from spinreg_core.runs.head import Head, read_head
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from tests.support.memory_store import Clock, Memory

CONFIG = RunConfig(run="r", resources=ResourcesConfig(lease_seconds=3600))
WRITERS = (0, 1)
STAGES = ("generate", "mix-opponent")


class Killed(BaseException):
    """The process is gone: no `except` and no `finally` of it has any effect on the store."""


@dataclass
class Scheduler:
    """Lets one writer go one step at a time, as `choices` say, and then without a switch."""

    choices: list[tuple[int, str]]  # (writer, go | kill | lose)
    log: list[tuple[list[int], int, int | None]] = field(default_factory=list)  # who could go, who went, who before
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._state = threading.Condition()
        self._waiting: set[int] = set()
        self._ended: set[int] = set()
        self._turn: int | None = None
        self._what = "go"
        self._dead: set[int] = set()

    def step(self, writer: int) -> bool:
        """Waits for its turn. Whether the reply to this request is lost."""
        with self._state:
            self._waiting.add(writer)
            self._state.notify_all()
            assert self._state.wait_for(lambda: self._turn == writer, 60), "the scheduler is gone"
            self._turn, what = None, self._what
            self._waiting.remove(writer)
            self._state.notify_all()
        if writer in self._dead:
            raise Killed
        return what == "lose"

    def ended(self, writer: int) -> None:
        with self._state:
            self._ended.add(writer)
            self._state.notify_all()

    def drive(self) -> None:
        last: int | None = None
        while True:
            with self._state:
                assert self._state.wait_for(lambda: len(self._waiting | self._ended) == len(WRITERS), 30), "a deadlock"
                able = sorted(self._waiting)
                if not able:
                    return
                number = len(self.log)
                if number < len(self.choices):
                    chosen, self._what = self.choices[number]
                else:
                    chosen, self._what = (last if last in able else able[0]), "go"
                assert chosen in able, "the same choices led elsewhere"
                if self._what == "kill":
                    self._dead.add(chosen)
                self.log.append((able, chosen, last))
                last, self._turn = chosen, chosen
                self._state.notify_all()
                assert self._state.wait_for(lambda: self._turn is None, 30), "a writer that does not move"


def beat(head: Head) -> None:
    head.lease.beat += 1


def head_in(data: dict[str, bytes]) -> Head:
    head = read_head(Memory(None, data), "r")  # type: ignore[arg-type]
    assert head is not None
    return head


def write(store: Any, writer: int, folder: Path) -> None:
    """Use the store as a flow run does: take the lease, make objects, commit them."""
    with hold_lease(store, CONFIG, str(writer), clock=Clock(store)) as session:
        session.commit_inputs("base-x", "data-x")
        for stage in STAGES:
            job = Job(stage, f"{stage}-x", {}, "memory", f"{session.writer()}-{writer}", 1, {}, CONFIG, folder)
            objects.publish(store, job, folder / str(writer), metrics={})
            session.commit(1, stage, job.object_id)
            session.update(beat)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for writer in (*WRITERS, 9):
        (tmp_path / str(writer)).mkdir()
        (tmp_path / str(writer) / "answers").write_text(f"drawn by {writer}")
    return tmp_path


def begun() -> dict[str, bytes]:
    """A run with its inputs committed by somebody who has given the lease back."""
    data: dict[str, bytes] = {}
    with hold_lease(Memory(None, data), CONFIG, "first") as session:  # type: ignore[arg-type]
        session.commit_inputs("base-x", "data-x")
    return data


def one_order(
    start: dict[str, bytes], choices: list[tuple[int, str]], folder: Path
) -> tuple[Scheduler, dict[str, bytes]]:
    scheduler = Scheduler(choices)
    store = Memory(scheduler, dict(start))
    ends: dict[int, BaseException | None] = {}

    def run(writer: int) -> None:
        store.writer.number = writer
        try:
            write(store, writer, folder)
            ends[writer] = None
        except BaseException as error:
            ends[writer] = error
        finally:
            scheduler.ended(writer)

    threads = [threading.Thread(target=run, args=(writer,)) for writer in WRITERS]
    for thread in threads:
        thread.start()
    scheduler.drive()
    for thread in threads:
        thread.join(30)
    for writer, error in ends.items():
        if not isinstance(error, LeaseHeld | LeaseLost | Killed | None):
            scheduler.problems.append(f"writer {writer} ended with {error!r}")
    if all(isinstance(error, LeaseHeld | LeaseLost) for error in ends.values()):
        scheduler.problems.append(f"nobody went on: {ends}")
    return scheduler, store.data


def orders(run: Callable[[list[tuple[int, str]]], Scheduler], switches: int, faults: str) -> Iterator[Scheduler]:
    """All orders with so many switches at most, and with each of the faults once at most, each order once."""
    waiting: list[tuple[list[tuple[int, str]], int, str]] = [([], 0, faults)]
    while waiting:
        choices, switched, left = waiting.pop()
        found = run(choices)
        yield found
        taken = list(choices)
        for able, chosen, last in found.log[len(choices) :]:
            for other in able:
                costs = switched + (last in able and other != last and last is not None)
                if costs > switches:
                    continue
                if other != chosen:
                    waiting.append(([*taken, (other, "go")], costs, left))
                waiting += [([*taken, (other, fault)], costs, left.replace(fault, "")) for fault in left.split()]
            taken.append((chosen, "go"))


LONG = os.environ.get("SPINREG_CHAOS") == "long"  # some minutes; without it, some seconds


@pytest.mark.parametrize(
    ("switches", "faults", "start", "least"),
    [(2 if LONG else 1, "", begun, 30), (1 if LONG else 0, "kill", begun, 30),
     pytest.param(1, "lose", begun, 30, marks=pytest.mark.long),
     pytest.param(1, "kill", dict, 30, marks=pytest.mark.long)],
)  # fmt: skip
def test_no_order_of_requests_mixes_two_writers(
    folder: Path, switches: int, faults: str, start: Callable[[], dict[str, bytes]], least: int
) -> None:
    data_before, walked, outcomes = start(), 0, set()
    last: list[dict[str, bytes]] = []

    def run(choices: list[tuple[int, str]]) -> Scheduler:
        scheduler, data = one_order(data_before, choices, folder)
        last[:] = [data]
        return scheduler

    for found in orders(run, switches, faults):
        walked += 1
        (data,) = last
        assert not found.problems, (found.problems, [chosen for _, chosen, _ in found.log])
        # The next start finishes the run, from what is committed.
        before = head_in(data)
        write(Memory(None, data), 9, folder)
        after = head_in(data)
        assert all(after.stage(1, stage) == f"{stage}-x" for stage in STAGES)
        assert all(before.stage(1, s) in (None, after.stage(1, s)) for s in STAGES)
        writers = tuple(json.loads(data[f"objects/{stage}-x/manifest.json"])["writer"][-1] for stage in STAGES)
        for stage, writer in zip(STAGES, writers, strict=True):
            (entry,) = json.loads(data[f"objects/{stage}-x/manifest.json"])["files"]
            assert data[entry["key"]] == f"drawn by {writer}".encode(), "a manifest's files are its own writer's"
        outcomes.add(writers)
    assert walked >= least
    if switches:
        assert {("0", "0"), ("1", "1"), ("0", "1")} <= outcomes, "the lease does change hands in the middle"


def test_the_walk_would_see_a_commit_without_a_lease(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: with a head that is written whatever its tag, orders are found that mix writers."""

    def careless(self: Memory, key: str, data: bytes, expected: str) -> str:
        return self.put(key, data, self.step())

    start = begun()
    monkeypatch.setattr(Memory, "replace", careless)
    found = orders(lambda choices: one_order(start, choices, folder)[0], 1, "")
    assert any(scheduler.problems for scheduler in found)
