"""Signals and parents of a stage process: it ends with its parent, and finishes its step on SIGTERM.

Leaves out: starting a stage (`main.py`), watching other ranks (`rank_watch.py`).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from spinreg_core.errors import EXIT_PREEMPTED
from spinreg_core.runtime.rank_watch import POLL_SECONDS

STARTER_VARIABLE = "SPINREG_STARTER"  # process id of the task's process, an ancestor of every stage process


class Preempted(SystemExit):
    """SIGTERM arrived: leave now, everything committed so far stays."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


@dataclass
class _Sigterm:
    deferred: bool = False
    at: float | None = None  # time.monotonic() of the first one


_sigterm = _Sigterm()


def on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    _sigterm.at = _sigterm.at or time.monotonic()
    if not _sigterm.deferred:
        raise Preempted


@contextmanager
def finishing_steps() -> Iterator[Callable[[], float | None]]:
    """Within, SIGTERM does nothing but to make the given function return its time (time.monotonic) instead of None.

    Whoever sees that finishes what is under way and leaves; Preempted is raised then.
    """
    _sigterm.deferred = True
    try:
        yield lambda: _sigterm.at
    finally:
        _sigterm.deferred = False
    if _sigterm.at is not None:
        raise Preempted


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def die_with_parent(should_exit: Callable[[], bool] = lambda: False) -> None:
    """End this process, and the process group it leads, soon after the parent is gone, or all is lost (`should_exit`).

    PDEATHSIG asks at once, with SIGHUP: unlike SIGTERM, which may come from anyone, it says that nobody is
    left to end the group (getppid does not say so yet while the parent's last threads end). The watching
    thread is for what sits in a long C call, and for a starter that was gone before this line (importing
    torch takes seconds). Engines' own children are reached by neither, only by ending the group.
    """
    parent = os.getppid()
    starter = int(os.environ.get(STARTER_VARIABLE, parent))
    hung_up = threading.Event()

    def on_hangup(_signum: int, _frame: FrameType | None) -> NoReturn:
        hung_up.set()
        raise Preempted

    def orphaned() -> bool:
        return hung_up.is_set() or os.getppid() != parent or _gone(starter)

    def over() -> bool:
        return orphaned() or should_exit()

    def end_group() -> None:
        if over() and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)

    def watch() -> None:
        while not over():
            time.sleep(POLL_SECONDS)
        time.sleep(3.0)
        end_group()
        os._exit(EXIT_PREEMPTED)

    signal.signal(signal.SIGHUP, on_hangup)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
    atexit.register(end_group)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
