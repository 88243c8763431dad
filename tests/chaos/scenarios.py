"""Disturb a run: a bad network, a dying store server, a full disk, a second flow, a frozen flow.

Each scene takes a run that is not started yet, waits for its end, and records losses in it. Leaves out: kills of the
run's own processes (one_run).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spinreg_core.runs.head import read_head
from spinreg_core.runs.stages import complete_round
from tests.chaos.fault_proxy import FaultProxy, fault_proxy
from tests.chaos.one_run import Kill, Killer, Lost, Run, kill_through
from tests.chaos.process_kinds import end_all, living
from tests.support.servers import S3Server, process, stop, wait_for
from tests.support.whole_runs import wait_until

Say = Callable[[str], None]
FULL = "free some space (`spinreg gc` lists"
HELD = 75  # exit status of a flow if another one advances the run
MIDDLE = ("round-1-generate", "round-1-mix-opponent", "round-1-train", "round-1-evaluate")


def rates(highest: float) -> dict[str, float]:
    """Return the rate of every fault; refusals and stale listings are the most frequent."""
    half = highest / 2
    return {"refused": highest, "lost": half, "torn": half, "slow": half, "doubled": half, "stale": highest,
            "flipped": half / 2}  # fmt: skip


@contextlib.contextmanager
def bad_network(run: Run, server: S3Server, faults: dict[str, float], seed: int = 0) -> Iterator[FaultProxy]:
    """Put a proxy between the run and its store; the harness reads the store directly."""
    with fault_proxy(server.endpoint, faults, seed) as proxy:
        run.env |= server.env | {"AWS_ENDPOINT_URL": proxy.endpoint}
        yield proxy


def under_faults(run: Run, killer: Killer, server: S3Server, highest: float, kills: int, say: Say) -> FaultProxy:
    """Complete a run under all faults and kills."""
    with bad_network(run, server, rates(highest), killer.draw.randrange(2**31)) as proxy:
        kill_through(run, killer, killer.plan(run.places(), kills), say)
    say(f"  {run.name}: {sum(proxy.happened.values())} faults in {proxy.requests} requests, {dict(proxy.happened)}")
    return proxy


def server_killed(run: Run, killer: Killer, server: S3Server, servers: contextlib.ExitStack, say: Say) -> None:
    """Kill the store's server during uploads, in several stages, and restart it seconds later.

    The server belongs to this scene; the last one ends with `servers`.
    """
    environment = os.environ | {name: server.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    with bad_network(run, server, {}) as proxy:
        serving, started, begin = server.running, run.start(), time.monotonic()
        try:
            for place in ("prepare", "round-1-generate", "round-1-train", "round-1-evaluate"):
                wait_until(lambda place=place: run.attempts.begun([place], begin) and proxy.writing, started, run.log)
                under_way = proxy.writing
                stop(serving, signal.SIGKILL)
                run.kills.append(Kill(place, "store", "SIGKILL", serving.poll() is not None))
                say(f"  {run.name}: SIGKILL to the store's server in {place}, {under_way} writes under way")
                time.sleep(killer.draw.uniform(0.5, 4))
                log = server.folder / "weed.log"
                serving = servers.enter_context(process(server.command, log, environment))
                wait_for(server.endpoint, serving, log, 60)
            run.to_the_end(started)
        finally:
            end_all(run.cache)


def may_mount(folder: Path) -> bool:
    """Check if this user can mount a file system of 1 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def full_disk(run: Run, mounted: Path, size: int, say: Say) -> None:
    """Start on a file system (`mounted`) of `size` bytes, which are too few, and continue after it has grown."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)], check=True)
    try:
        status = run.wait(run.start())
        error = run.log.read_text().rpartition("\nspinreg: ")[2].strip()
        say(f"  {run.name}: full at {size / 1e6:.1f} MB; status {status}: {error.splitlines()[-1].strip()}")
        if status != 1 or FULL not in error or "Traceback" in error:
            raise Lost(f"{run.name}: expected status 1 and one error that names the full disk; found {run.said()}")
        run.check_committed()
        subprocess.run(["mount", "-o", f"remount,size={100 * size}", str(mounted)], check=True)
        run.to_the_end(run.start())
    finally:
        end_all(run.cache)


def unmount(mounted: Path) -> None:
    subprocess.run(["umount", "-l", str(mounted)], check=False)


def two_at_once(run: Run, say: Say) -> None:
    """Start two flows on one run: one advances it, the other ends and names the first."""
    flows = [run.start(), run.start()]
    try:
        statuses = [run.wait(flow) for flow in flows]
        say(f"  {run.name}: two flows at once ended with {statuses}")
        if sorted(statuses) != [0, HELD] or "is being advanced by" not in run.log.read_text():
            raise Lost(f"{run.name}: two flows at once ended with {statuses}, expected 0 and {HELD}: {run.said()}")
    finally:
        end_all(run.cache)


def frozen(run: Run, killer: Killer, with_stages: bool, say: Say) -> None:
    """Freeze a flow during a stage, alone or with its processes, let another take its lease, and wake it."""
    place = killer.draw.choice(MIDDLE)
    first, begin = run.start(), time.monotonic()
    assert isinstance(first, subprocess.Popen)
    try:
        wait_until(lambda: run.attempts.begun([place], begin), first, run.log)
        time.sleep(killer.delay(place) / 2)
        pids = [pid for found in living(run.cache).values() for pid in found] if with_stages else [first.pid]
        _signal(pids, signal.SIGSTOP)
        epoch = _epoch(run)
        second = run.start()
        wait_until(lambda: _epoch(run) > epoch, second, run.log)
        time.sleep(killer.draw.uniform(0, 8))
        during = complete_round(read_head(run.store, run.name) or {"rounds": []})
        _signal(pids, signal.SIGCONT)
        status, other = run.wait(first), run.wait(second)
        say(f"  {run.name}: frozen in {place} {'with its stages' if with_stages else 'alone'}, woken when round "
            f"{during} was complete: it ended with {status}, the other with {other}")  # fmt: skip
        if status == 0 or other != 0 or "was taken over by" not in run.log.read_text():
            raise Lost(f"{run.name}: the woken flow ended with {status}, the other with {other}: {run.said()}")
        if _epoch(run) != epoch + 1:
            raise Lost(f"{run.name}: the lease changed hands {_epoch(run) - epoch} times, not once")
    finally:
        _signal([pid for found in living(run.cache).values() for pid in found], signal.SIGCONT)
        end_all(run.cache)


def _signal(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _epoch(run: Run) -> int:
    head = read_head(run.store, run.name)
    return 0 if head is None else int(head.lease.epoch)
