"""Run whole runs under kills, faults, a full disk and second flows; each must end like the undisturbed run.

    python tests/chaos/harness.py [--kills 50] [--minutes N] [--store folder|s3] [--seed 0] [--only SCENE] [--short]

`make chaos` is the long form. `--short` (CI; at most 90 s on an idle machine): one round, killed three times, behind a
bad network. A run is the smoke configuration with more work in every stage. The harness needs no network and leaves
nothing behind. The seed determines its actions; their exact instants depend on the machine.

The last line is one JSON object:

    kills                  processes that were alive, got SIGKILL or SIGTERM, and ended
    faults                 faulty requests between runs and their store
    bad_inputs             wrong inputs fed to their readers (tests/bad_input); null if that scene was left out
    losses                 results, commits and ends that broke a promise; `lost` names them
    work_repeated_percent  repeated share of the seconds of all attempts at stages in killed runs: the time after the
                           last shard or checkpoint of an uncommitted attempt, or all of its time without one
    seconds, runs, ...     of the harness
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from spinreg_core.errors import SpinregError
from tests.chaos.deployed import FlowRun, deploy
from tests.chaos.one_run import Killer, Lost, Run, kill_through, result
from tests.chaos.scenarios import frozen, full_disk, may_mount, server_killed, two_at_once, under_faults, unmount
from tests.support.servers import PrefectServer, S3Server, prefect_server, s3_server

ROOT = Path(__file__).resolve().parents[2]
KILLS_PER_RUN = 7


def say(line: str) -> None:
    print(line, flush=True)


class Harness:
    def __init__(
        self, arguments: argparse.Namespace, folder: Path, server: PrefectServer, s3: S3Server, begin: float
    ) -> None:
        self.arguments, self.folder, self.server, self.s3, self.begin = arguments, folder, server, s3, begin
        self.killer = Killer(random.Random(arguments.seed))
        self.rounds = 1 if arguments.short else 2
        self.runs: list[Run] = []
        self.faults: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.bad_inputs: int | None = None  # number of tried cases
        self.lost: list[str] = []  # losses outside runs
        self.pool = ThreadPoolExecutor(1)
        self.expected: dict[int, Future[dict[str, Any]]] = {}  # by number of processes
        self.seconds: Counter[str] = Counter()

    @property
    def kills(self) -> int:
        return sum(kill.hit for run in self.runs for kill in run.kills)

    def in_time(self, what: str) -> bool:
        minutes = self.arguments.minutes
        if minutes is None or time.monotonic() - self.begin < 60 * minutes:
            return True
        self.skipped.append(f"{what}: the time was over")
        return False

    def run(self, what: str, *, url: str | None = None, s3: S3Server | None = None, processes: int = 1) -> Run:
        """Return a run that is not started yet: in a folder of its own, at `url`, or in a store on S3."""
        name = f"{what}-{len(self.runs)}"
        folder = self.folder / name
        url = s3.url(name) if s3 is not None else url or str(folder / "store")
        run = Run(name, folder, url, self.server, self.rounds, processes, {} if s3 is None else dict(s3.env))
        self.runs.append(run)
        return run

    def see(self, run: Run, scene: Callable[[], Any]) -> Any:
        """Play a scene, compare its run with the undisturbed one, and print and count losses."""
        before, found = len(run.losses), None
        with run.attempts:
            try:
                found = scene()
                run.compare(self.undisturbed(run.processes).result())
            except (Lost, AssertionError, OSError, SpinregError, subprocess.SubprocessError) as error:
                run.losses.append(f"{type(error).__name__}: {error}")
        for line in run.losses[before:]:
            say(f"LOST {line}")
        if any(kill.victim != "store" for kill in run.kills):
            with contextlib.suppress(OSError, SpinregError):  # reported above already
                self.seconds.update(run.attempts.seconds(run.store))
        return found

    def undisturbed(self, processes: int) -> Future[dict[str, Any]]:
        """Return the result of the undisturbed run, made once for every number of processes."""
        if processes not in self.expected:
            run = self.run("calm", processes=processes)
            self.expected[processes] = self.pool.submit(self._undisturbed, run)
        return self.expected[processes]

    def _undisturbed(self, run: Run) -> dict[str, Any]:
        begin = time.monotonic()
        with run.attempts:
            run.to_the_end(run.start())
        attempts = run.attempts.all.values()
        seconds = {attempt.place: attempt.end - attempt.begin for attempt in attempts}
        self.killer.stage_seconds |= seconds | {"start": min(attempt.begin for attempt in attempts) - begin}
        told = ", ".join(f"{place} {taken:.1f}" for place, taken in self.killer.stage_seconds.items())
        say(f"the undisturbed run with {run.processes} processes took {time.monotonic() - begin:.0f} s: {told}")
        return result(run)

    def killed(self) -> None:
        number = 0
        while self.kills < self.arguments.kills and self.in_time(f"kills after {self.kills}"):
            processes = 2 if number % 3 == 1 else 1
            self.undisturbed(processes).result()
            on = self.arguments.store or ("folder", "s3")[number % 2]
            run = self.run("killed", s3=self.s3 if on == "s3" else None, processes=processes)
            plan = self.killer.plan(run.places(), min(KILLS_PER_RUN, self.arguments.kills - self.kills))
            say(f"{len(plan)} kills, {processes} processes, on {on}")
            self.see(run, lambda run=run, plan=plan: kill_through(run, self.killer, plan, say))
            if not run.kills:  # no kill hits here, so none ever will
                break
            number += 1

    def by_worker(self) -> None:
        if self.in_time("runs by a worker"):
            deploy(self.server)
            run = self.run("worker")
            run.starter = FlowRun
            say("4 kills of a run by a Prefect worker, which may be one of the victims")
            plan = self.killer.plan(run.places()[2:], 4)
            self.see(run, lambda: kill_through(run, self.killer, plan, say))

    def faulty(self, highest: float, kills: int) -> None:
        if self.in_time(f"faults at {highest:.0%}"):
            run = self.run("faulty", s3=self.s3)
            say(f"faults in up to {highest:.0%} of the requests, and {kills} kills")
            proxy = self.see(run, lambda: under_faults(run, self.killer, self.s3, highest, kills, say))
            self.faults.update({} if proxy is None else proxy.happened)

    def store_server(self) -> None:
        if self.in_time("the store's server killed"):
            with s3_server(self.folder / "s3-killed") as own, in_environment(own.env), ExitStack() as servers:
                run = self.run("store", s3=own)
                say("the store's server killed while it is written to")
                self.see(run, lambda: server_killed(run, self.killer, own, servers, say))

    def disk(self) -> None:
        small, calm = self.folder / "small", Path(self.runs[0].url)
        size = sum(path.stat().st_blocks * 512 for path in calm.rglob("*"))
        if not may_mount(small):
            self.skipped.append("full disk: this user cannot mount a small file system")
            return
        for share in (0.2, 0.5, 0.8):
            if self.in_time(f"full disk at {share:.0%}"):
                say(f"a disk with room for {share:.0%} of the run")
                run, room = self.run("full", url=str(small / "store")), int(share * size)
                try:
                    self.see(run, lambda run=run, room=room: full_disk(run, small, room, say))
                finally:
                    unmount(small)

    def bad_input(self) -> None:
        if self.in_time("bad input"):
            say("everything in tests/bad_input, each of which must end in its one error")
            cases = ROOT / "tests/bad_input/test_bad_input.py"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                str(cases),
                "-k",
                "test_bad_input_ends_with_one_clear_error",
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            told = done.stdout
            counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", told)}
            self.bad_inputs = sum(counts.values())
            self.lost += [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if done.returncode not in (0, 1) or not self.bad_inputs:
                self.lost.append(f"tests/bad_input could not be run: {(told + done.stderr)[-500:]}")

    def flows(self) -> None:
        for what in ("two flows at once", "a frozen flow", "a frozen flow with its stages"):
            if self.in_time(what):
                say(what)
                run = self.run("flows")
                if what == "two flows at once":
                    self.see(run, lambda run=run: two_at_once(run, say))
                else:
                    stages = what.endswith("stages")
                    self.see(run, lambda run=run, stages=stages: frozen(run, self.killer, stages, say))

    def summary(self) -> dict[str, Any]:
        kills = [kill for run in self.runs for kill in run.kills if kill.hit]
        losses = self.lost + [line for run in self.runs for line in run.losses]
        share = {
            k: round(100 * self.seconds[k] / max(self.seconds["all"], 1e-9), 1) for k in ("repeated", "uncommitted")
        }
        return {
            "kills": len(kills),
            "faults": sum(self.faults.values()),
            "bad_inputs": self.bad_inputs,
            "work_repeated_percent": share["repeated"],
            "losses": len(losses),
            "seconds": round(time.monotonic() - self.begin),
            "runs": len(self.runs),
            "starts": sum(run.starts for run in self.runs),
            "seconds_repeated_per_kill": round(self.seconds["repeated"] / max(len(kills), 1), 2),
            "attempts_in_vain_percent": share["uncommitted"],
            "victims": dict(Counter(kill.victim for kill in kills)),
            "signals": dict(Counter(kill.signal for kill in kills)),
            "places": dict(Counter(kill.place for kill in kills)),
            "missed": sum(not kill.hit for run in self.runs for kill in run.kills),
            "kinds_of_faults": dict(self.faults),
            "scenes": dict(Counter(run.name.rpartition("-")[0] for run in self.runs)),
            "skipped": self.skipped,
            "lost": losses,
            "seed": self.arguments.seed,
            "load": os.getloadavg()[0],
        }


@contextlib.contextmanager
def in_environment(env: dict[str, str]) -> Iterator[None]:
    """Set the runs' environment in the harness too; s3fs would reuse a connection to another address."""
    from s3fs import S3FileSystem

    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})
        S3FileSystem.clear_instance_cache()


def faults(harness: Harness) -> None:
    for highest in (0.2, 0.1, 0.05):
        harness.faulty(highest, 2)


SCENES: dict[str, Callable[[Harness], None]] = {
    "flows": Harness.flows, "disk": Harness.disk, "server": Harness.store_server, "faults": faults,
    "worker": Harness.by_worker, "bad-input": Harness.bad_input, "kills": Harness.killed,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="so many at least in all (default 50)")
    parser.add_argument("--minutes", type=float, help="begin nothing more after this long")
    parser.add_argument("--store", choices=("folder", "s3"), help="of the killed runs (default: in turn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=SCENES, help="of the long form (may be repeated)")
    parser.add_argument("--short", action="store_true", help="what CI runs")
    arguments = parser.parse_args()
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers, mounts and folders are cleaned up
    with (
        tempfile.TemporaryDirectory(prefix="spinreg-chaos-") as name,
        s3_server(Path(name) / "s3") as s3,
        in_environment(s3.env | {"SPINREG_CACHE": f"{name}/cache"}),
        prefect_server(Path(name) / "prefect") as server,
    ):
        harness = Harness(arguments, Path(name), server, s3, begin)
        try:
            if arguments.short:
                harness.undisturbed(1)  # in a thread, because there are two cores
                harness.faulty(0.1, 3)
            else:
                harness.undisturbed(1).result()
                for scene in arguments.only or SCENES:
                    SCENES[scene](harness)
        except KeyboardInterrupt:
            harness.skipped.append(
                f"interrupted in {harness.runs.pop().name}, which does not count, and what was to follow"
            )
        figures = harness.summary()
    print(json.dumps(figures), flush=True)
    return 1 if figures["losses"] else 0


if __name__ == "__main__":
    sys.exit(main())
