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
    """SIGTERM arrived: the process ends now, and its committed parts stay."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


@dataclass
class _Sigterm:
    deferred: bool = False
    # time.monotonic() of the first signal.
    at: float | None = None


_sigterm = _Sigterm()


def on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    _sigterm.at = _sigterm.at or time.monotonic()
    if not _sigterm.deferred:
        raise Preempted


@contextmanager
def finishing_steps() -> Iterator[Callable[[], float | None]]:
    """Defer SIGTERM inside the block: the given function returns its time (time.monotonic) instead of None.

    The caller checks the function, finishes its step and leaves the block, which then raises Preempted.
    """
    _sigterm.deferred = True
    try:
        yield lambda: _sigterm.at
    finally:
        _sigterm.deferred = False
        at, _sigterm.at = _sigterm.at, None
    if at is not None:
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
    """End this process, and the process group it leads, soon after its parent ends or `should_exit` returns True.

    PDEATHSIG sends SIGHUP at once. Unlike SIGTERM, which anyone may send, it proves that the parent is gone (getppid
    still names the parent while its last threads end). The watching thread covers a process inside a long C call, and
    a starter that ended before this call (importing torch takes seconds). Neither reaches the children of engines,
    which end with the group.
    """
    parent = os.getppid()
    starter = int(os.environ.get(STARTER_VARIABLE, parent))
    hung_up = threading.Event()

    def on_hangup(_signum: int, _frame: FrameType | None) -> NoReturn:
        hung_up.set()
        raise Preempted

    def over() -> bool:
        return hung_up.is_set() or os.getppid() != parent or _gone(starter) or should_exit()

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
        # PR_SET_PDEATHSIG is 1.
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)
    atexit.register(end_group)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
