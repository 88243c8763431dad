"""Start one run repeatedly until it is complete, and compare it with the undisturbed one.

Decides: the run, the instants of kills (in every stage, and before the first), their victims, and the definition of a
loss. Leaves out: other disturbances (scenarios), and the list of runs (harness).
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spinreg_core.maintenance.verify import verify
from spinreg_core.runs.head import read_head
from spinreg_core.runs.objects import manifest_key, read_record
from spinreg_core.runs.stages import complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.chaos.process_kinds import SIGNALS, end_all, living, strike, wait_gone
from tests.chaos.writers import Attempts
from tests.support.servers import PrefectServer
from tests.support.whole_runs import SMOKE, environment, generations, outcome, start

# The smoke configuration with more work in every stage, so that kills hit stages at work.
WORK = {"data.prompts_per_round": 24, "generation.max_new_tokens": 48, "training.epochs": 10,
        "evaluation.bootstrap": 100, "resources.retry_delay_seconds": 0.5}  # fmt: skip
PATIENCE = 900.0  # seconds to wait for one start of a run


class Started(Protocol):
    """One start of a run: a process, or an object with the same methods."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


class Lost(Exception):
    """A promise was broken."""


@dataclass
class Kill:
    place: str
    victim: str
    signal: str
    hit: bool  # the victim was alive before and not after


@dataclass
class Run:
    """A run in a store and a cache of its own, started by the same command every time."""

    name: str
    folder: Path
    url: str
    server: PrefectServer
    rounds: int
    processes: int = 1
    env: dict[str, str] = field(default_factory=dict)
    starter: Callable[[Run], Started] | None = None  # unset: the command `python -m flows.spin`
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.log, self.cache = self.folder / "log", self.folder / "cache"
        self.store: Store = open_store(self.url)
        self.attempts = Attempts(self.cache)
        self.kills: list[Kill] = []
        self.losses: list[str] = []
        self._known: dict[str, Any] = {}

    def parameters(self) -> dict[str, Any]:
        return WORK | {"resources.processes": self.processes}

    def start(self) -> Started:
        self.starts += 1
        if self.starter is not None:
            return self.starter(self)
        given = [part for name, value in self.parameters().items() for part in ("-p", f"{name}={value}")]
        arguments = ["--config", SMOKE, "--run", self.name, "--until-round", str(self.rounds), "--store", self.url]
        return start([*arguments, *given], environment(self.folder, self.server, **self.env), self.log)

    def places(self) -> list[str]:
        rounds = [f"round-{n}-{stage}" for n in range(1, self.rounds + 1) for stage in stages_of(1)]
        return ["prepare", "round-0-evaluate", *rounds]

    def said(self, count: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-count:]

    def wait(self, process: Started) -> int:
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            end_all(self.cache)
            raise Lost(f"{self.name}: nothing after {PATIENCE:.0f} s: {self.said()}") from None

    def to_the_end(self, process: Started, disturbed: bool = False) -> None:
        """Wait, and start the run again if it ended early. Without a disturbance a start must not fail."""
        while (status := self.wait(process)) != 0:
            if not disturbed:
                raise Lost(f"{self.name}: ended by itself with status {status}: {self.said()}")
            self.check_committed()
            process, disturbed = self.start(), False

    def check_committed(self) -> None:
        """Add commits that were seen before and are gone or changed to the losses."""
        head = read_head(self.store, self.name)
        if head is None:
            if self._known:
                self.losses.append(f"{self.name}: head.json is gone")
            return
        now: dict[str, Any] = {f"{e.round} {s}": o for e in head.rounds for s, o in e.stages.items()}
        for object_id in {key.split("/")[1] for key in self.store.list("objects/") if key.endswith("/manifest.json")}:
            now[manifest_key(object_id)] = read_record(self.store, object_id)
        for name, value in self._known.items():
            if now.get(name) != value:
                self.losses.append(f"{self.name}: {name} was committed, and is not what it was")
        self._known = now

    def compare(self, expected: dict[str, Any]) -> None:
        """Add differences from the undisturbed run, and damage, to the losses."""
        self.check_committed()
        found = result(self)
        for name in sorted(expected.keys() | found.keys()):
            one, other = expected.get(name), found.get(name)
            if one != other:
                sizes = f" ({len(one)} and {len(other)} entries)" if one is not None and other is not None else ""
                self.losses.append(f"{self.name}: {name} differs from the undisturbed run{sizes}")
        self.losses += [f"{self.name}: {p.file}: found {p.found}" for p in verify(self.store, self.name).problems]
        if left := {kind: pids for kind, pids in living(self.cache).items() if not wait_gone(pids, 20)}:
            self.losses.append(f"{self.name}: processes are left: {left}")


def result(run: Run) -> dict[str, Any]:
    """Return the SHA-256 of the weights, pairs, answers and metrics of every round; no disturbance may change it."""
    head = read_head(run.store, run.name)
    if head is None or complete_round(head) != run.rounds:
        raise Lost(f"{run.name}: it ended well, but {run.rounds} rounds are not complete")
    found = outcome(run.store, run.name)
    for number in range(1, run.rounds + 1):
        rows = generations(run.store, run.name, number)
        names = ("prompt_id", "answer", "answer_ids", "finish", "seed")
        found[f"generations-{number}"] = sorted([row[name] for name in names] for row in rows)
    return found


@dataclass
class Killer:
    """Draws instants and victims. Every place, and every kind of victim, comes up before one comes up again."""

    draw: random.Random
    stage_seconds: dict[str, float] = field(default_factory=dict)  # of the undisturbed run
    deck: list[str] = field(default_factory=list)
    struck: dict[str, int] = field(default_factory=dict)

    def plan(self, places: Sequence[str], count: int) -> list[str]:
        """Return `count` places in the order of a run. "start" is the instant right after a start."""
        chosen: list[str] = []
        while len(chosen) < count:
            if not (usable := [place for place in self.deck if place in ("start", *places)]):
                self.deck += self.draw.sample(["start", *places], len(places) + 1)
                continue
            chosen.append(usable[0])
            self.deck.remove(usable[0])
        return sorted(chosen, key=["start", *places].index)

    def delay(self, place: str) -> float:
        return self.draw.uniform(0, 1.2 * self.stage_seconds.get(place, 4.0))

    def victim(self, kinds: Sequence[str]) -> tuple[str, signal.Signals]:
        """Return one of the living kinds that came up least so far, and a signal."""
        least = min(self.struck.get(kind, 0) for kind in kinds)
        kind = self.draw.choice([kind for kind in sorted(kinds) if self.struck.get(kind, 0) == least])
        self.struck[kind] = self.struck.get(kind, 0) + 1
        # A machine that goes down kills all its processes at once, without SIGTERM. A worker waits for its flow runs
        # after SIGTERM.
        at_once = kind in ("all", "prefect", "worker")
        return kind, signal.SIGKILL if at_once else self.draw.choice(SIGNALS)


def kill_through(run: Run, killer: Killer, places: Sequence[str], say: Callable[[str], None]) -> None:
    """Start the run, kill at each of `places` in turn, restart it after each end, and wait until it is complete."""
    process, since, disturbed = run.start(), time.monotonic(), False
    try:
        for place in places:
            later = run.places()[run.places().index(place) :] if place != "start" else []
            now: str | None = place
            while later and (now := run.attempts.begun(later, since)) is None:
                if (status := process.poll()) is not None:
                    if status == 0:
                        return  # the run was complete before the next kill
                    if not disturbed:
                        raise Lost(f"{run.name}: ended by itself with status {status}: {run.said()}")
                    process, disturbed = run.start(), False
                time.sleep(0.02)
            time.sleep(killer.delay(place))
            kill = strike_one(run, killer, process, str(now))
            since, disturbed = time.monotonic(), True
            if kill is not None:
                say(f"  {run.name}: {kill.signal} to {kill.victim} in {kill.place}{'' if kill.hit else ' (missed)'}")
                run.kills.append(kill)
            if process.poll() is not None and process.returncode != 0:
                run.check_committed()
                process, disturbed = run.start(), False
        run.to_the_end(process, disturbed)
    finally:
        end_all(run.cache)


def strike_one(run: Run, killer: Killer, process: Started, place: str) -> Kill | None:
    """Kill a living process of the run, or its Prefect server. Return None if the run has no living process."""
    alive = living(run.cache)
    alive.pop("other", None)
    if process.poll() is not None or "flow" not in alive:
        return None
    kind, signum = killer.victim([*alive, "all"] + ["prefect"] * (killer.draw.random() < 0.15))
    if kind == "prefect":
        assert run.server.running is not None
        pids = [run.server.running.pid]
        run.server.stop(signum)
        time.sleep(killer.draw.uniform(0, 3))
        run.server.start()
        return Kill(place, kind, signum.name, wait_gone(pids, 1))
    pids = [pid for found in living(run.cache).values() for pid in found] if kind == "all" else alive[kind]
    hit = strike(pids if kind == "all" else [killer.draw.choice(pids)], signum)
    if kind in ("all", "flow"):
        process.wait(60)
    if kind in ("all", "flow", "stage", "rank"):
        run.attempts.ended()
    return Kill(place, kind, signum.name, hit)
