"""Find the processes of a run by kind, and kill them.

Decides: that all processes with the run's SPINREG_CACHE belong to it, the kind of each, and that a kill counts only if
its victim was alive before and not after. Leaves out: the instants of kills, and the checks afterwards (one_run).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
_GONE_SECONDS = 40.0  # more than resources.stop_seconds, which a stage may take after SIGTERM


def living(cache: Path) -> dict[str, list[int]]:
    """Process ids of a run by kind: flow, worker, stage, rank, engine, other."""
    found: dict[str, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"SPINREG_CACHE={cache}" in environ and _lives(int(folder.name)):
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                found.setdefault(_kind(command, environ), []).append(int(folder.name))
    return found


def _kind(command: str, environ: list[str]) -> str:
    if "spinreg_core.generation.worker" in command:
        return "engine"
    if "spinreg_core.stages." in command:
        return "rank" if any(name.startswith("RANK=") for name in environ) else "stage"
    if "prefect worker start" in command:
        return "worker"
    is_flow = "-m flows.spin" in command or "prefect.engine" in command or "prefect.flow_engine" in command
    return "flow" if is_flow else "other"


def _stat(pid: int) -> list[str]:
    """Of /proc/PID/stat: state, parent, ... (fields 3 and on)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def strike(pids: list[int], signum: int) -> bool:
    """Signal processes. Return True if at least one was alive before and none is afterwards."""
    hit = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            lived = _lives(pid)
            os.kill(pid, signum)
            hit = hit or lived
    return wait_gone(pids, _GONE_SECONDS) and hit


def wait_gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def end_all(cache: Path) -> None:
    """Kill all processes of a run."""
    for pids in living(cache).values():
        strike(pids, signal.SIGKILL)
