"""Who holds a lease: the process, and whether it is known to be dead.

Decides: by what a process of this machine is told from a later one with its number. Leaves out: leases (`head.py`).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def _process_identity(pid: int) -> str | None:
    """Boot, pid namespace, pid and start time of a process of this machine; None where that cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot} {namespace} {pid} {started}"


def make_holder(label: str) -> dict[str, Any]:
    """Who this process is, for messages and for seeing that a dead holder on this machine is dead."""
    pid = os.getpid()
    return {"label": label, "host": socket.gethostname(), "pid": pid, "identity": _process_identity(pid)}


def is_dead(holder: dict[str, Any]) -> bool:
    """True only if the holder was a process of this boot and pid namespace that lives no more.

    That its /proc/PID/stat cannot be read proves nothing: hidepid, or no file descriptor left.
    """
    identity, own = holder.get("identity"), _process_identity(os.getpid())
    if not identity or not own or identity.split()[:2] != own.split()[:2]:
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it lives and is somebody else's; or no process has such a number
        pass
    return _process_identity(int(holder["pid"])) not in (None, identity)
