"""Two writers of one run, in every order in which their requests can reach the store, up to a number of switches.

The real code runs in two threads. Each request to the store is a step, and so is each sleep while a writer waits for a
lease. A scheduler decides whose step comes next. Every sleep is longer than any lease: to each writer, the other may be
frozen, cut off from the store or dead at any time, and may come back at any time.

With `kill`, one writer dies before one of its steps. With `lose`, the reply to one of the writes is lost, and its retry
reports a conflict. The walk is depth first and bounds the switches away from a writer that could have continued
(Musuvathi and Qadeer, CHESS): without a bound there are millions of orders.

After every step, a head must follow its predecessor: no committed stage is changed or dropped, and the epoch never
falls. Only the lease holder has committed, and a manifest never changes. Both writers commit objects of the same names,
as two flows of one run do; `test_head.py` covers the replacement of a stage by another object.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import ResourcesConfig, RunConfig
from spinreg_core.errors import Conflict, LeaseHeld, LeaseLost
from spinreg_core.runs import lease, objects
from spinreg_core.runs.head import Head, config_key, head_key
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease

CONFIG = RunConfig(run="r", resources=ResourcesConfig(lease_seconds=3600))
WRITERS = (0, 1)
STAGES = ("generate", "mix-opponent")


class Killed(BaseException):
    """End of a process. No `except` and no `finally` of it has any effect on the store."""


@dataclass
class Scheduler:
    """Lets one writer take one step at a time, in the order of `choices`, and after those without a switch."""

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
        """Wait for the writer's turn. Return True if the reply to this request is lost."""
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
                assert chosen in able, "the same choices led to another state"
                if self._what == "kill":
                    self._dead.add(chosen)
                self.log.append((able, chosen, last))
                last, self._turn = chosen, chosen
                self._state.notify_all()
                assert self._state.wait_for(lambda: self._turn is None, 30), "a writer that does not move"


class Memory:
    """A store in memory. Its requests are steps, and it checks the promises after each."""

    url = "memory"

    def __init__(self, scheduler: Scheduler | None, data: dict[str, bytes]) -> None:
        self.scheduler, self.data, self.writer = scheduler, data, threading.local()

    def _step(self) -> bool:
        return self.scheduler is not None and self.scheduler.step(self.writer.number)

    def check(self) -> None:
        pass

    def uri(self, key: str) -> str:
        return key

    def read(self, key: str) -> bytes | None:
        self._step()
        return self.data.get(key)

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        found = self.read(key)
        return None if found is None else (found, tag(found))

    def create(self, key: str, data: bytes) -> str:
        lost = self._step()
        if self.data.get(key, data) != data:
            raise Conflict(key)
        return self._put(key, data, lost)

    def replace(self, key: str, data: bytes, expected: str) -> str:
        lost = self._step()
        if key not in self.data or tag(self.data[key]) != expected:
            raise Conflict(key)
        return self._put(key, data, lost)

    def upload(self, path: Path, key: str) -> None:
        self._step()
        self._put(key, path.read_bytes())

    def delete(self, key: str) -> None:
        assert key.startswith("probes/"), "only probes are deleted; that is no step, because their names are random"
        self.data.pop(key, None)

    def size(self, key: str) -> int | None:
        self._step()
        return len(self.data[key]) if key in self.data else None

    def list(self, prefix: str) -> list[str]:
        self._step()
        return sorted(key for key in self.data if key.startswith(prefix))

    def _put(self, key: str, data: bytes, lost: bool = False) -> str:
        before, self.data[key] = self.data.get(key), data
        if self.scheduler is not None and before is not None and before != data:
            problem = self._problem(key, before, data)
            if problem:
                self.scheduler.problems.append(problem)
        if lost:
            raise Conflict(key)
        return tag(data)

    def _problem(self, key: str, before: bytes, after: bytes) -> str | None:
        if key == config_key("r") or key.startswith("probes/"):
            return None  # a configuration before the run has a head, or a probe
        if key != head_key("r"):
            return f"{key} was overwritten"
        old, new = json.loads(before), json.loads(after)
        if new["lease"]["epoch"] < old["lease"]["epoch"]:
            return "the epoch fell"
        committed = [(e["round"], stage, found) for e in old["rounds"] for stage, found in e["stages"].items()]
        if any(new.stage(number, stage) != found for number, stage, found in committed):
            return "a committed stage was changed"
        if any(old.get(name) not in (None, new.get(name)) for name in ("base", "data")):
            return "a committed input was changed"
        if new["rounds"] != old["rounds"]:
            if new["lease"]["epoch"] != old["lease"]["epoch"]:
                return "a stage was committed with a change of the lease"
            if new["lease"]["holder"] is None or new["lease"]["holder"]["label"] != str(self.writer.number):
                return f"writer {self.writer.number} committed under the lease of {new['lease']['holder']}"
        return None


def tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clock:
    """Replaces `time` for those who wait for a lease: to the sleeper, every sleep is longer than any lease."""

    def __init__(self, store: Memory) -> None:
        self._store, self._now = store, threading.local()

    def monotonic(self) -> float:
        return getattr(self._now, "seconds", 0.0)

    def sleep(self, seconds: float) -> None:
        self._store._step()
        self._now.seconds = self.monotonic() + 1e6


def write(store: Any, writer: int, folder: Path) -> None:
    """Use the store as a flow run does: take the lease, make objects, commit them."""
    with hold_lease(store, CONFIG, str(writer)) as session:
        session.commit_inputs("base-x", "data-x")
        for stage in STAGES:
            job = Job(stage, f"{stage}-x", {}, "memory", f"{session.writer()}-{writer}", 1, {}, CONFIG, folder)
            objects.publish(store, job, folder / str(writer), metrics={})
            session.commit(1, stage, job.object_id)
            session.update(lambda head: head.lease.update(beat=head.lease.beat + 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for writer in (*WRITERS, 9):
        (tmp_path / str(writer)).mkdir()
        (tmp_path / str(writer) / "answers").write_text(f"drawn by {writer}")
    return tmp_path


def begun() -> dict[str, bytes]:
    """Return the store of a run with committed inputs and a released lease."""
    data: dict[str, bytes] = {}
    with hold_lease(Memory(None, data), CONFIG, "first") as session:  # type: ignore[arg-type]
        session.commit_inputs("base-x", "data-x")
    return data


def one_order(
    start: dict[str, bytes], choices: list[tuple[int, str]], folder: Path, kind: type[Memory] = Memory
) -> tuple[Scheduler, dict[str, bytes]]:
    scheduler = Scheduler(choices)
    store = kind(scheduler, dict(start))
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", Clock(store))
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
        scheduler.problems.append(f"no writer continued: {ends}")
    return scheduler, store.data


def orders(run: Callable[[list[tuple[int, str]]], Scheduler], switches: int, faults: str) -> Iterator[Scheduler]:
    """Yield each order once, with at most so many switches and each of the faults at most once."""
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
def test_two_writers_in_any_order_never_mix(
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
        # The next writer finishes the run from its committed stages.
        before = Head.model_validate(json.loads(data[head_key("r")]))
        with pytest.MonkeyPatch.context() as patch:
            store = Memory(None, data)
            patch.setattr(lease, "time", Clock(store))
            write(store, 9, folder)
        after = Head.model_validate(json.loads(data[head_key("r")]))
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


def test_walk_finds_a_commit_without_a_lease(folder: Path) -> None:
    """The check of the check: a store that ignores tags lets some orders mix writers."""

    class Careless(Memory):
        def replace(self, key: str, data: bytes, expected: str) -> str:
            return self._put(key, data, self._step())

    start = begun()
    found = orders(lambda choices: one_order(start, choices, folder, Careless)[0], 1, "")
    assert any(scheduler.problems for scheduler in found)
