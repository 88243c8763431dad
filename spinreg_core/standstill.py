"""For how long the main thread has waited for files of the store without a byte having moved.

Decides: what counts as standing still. Leaves out: what follows from it (`stages/watch.py`: a rank that the others wait
for ends). Other threads count while the main one waits for them: a checkpoint that cannot be stored meanwhile costs a
checkpoint, not the stage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Operation:
    what: str
    thread: threading.Thread
    moved_at: float

    def moved(self, _bytes: int = 0) -> None:
        self.moved_at = time.monotonic()


_under_way: list[_Operation] = []  # inner ones after outer ones
_awaited: list[threading.Thread] = [threading.main_thread()]


@contextmanager
def moving(what: str) -> Iterator[Callable[[int], None]]:
    """Around an operation of the store. The function given is to be called whenever bytes have moved."""
    operation = _Operation(what, threading.current_thread(), time.monotonic())
    _under_way.append(operation)
    try:
        yield operation.moved
    finally:
        _under_way.remove(operation)


@contextmanager
def awaiting(thread: threading.Thread) -> Iterator[None]:
    """While the main thread waits for another one."""
    _awaited.append(thread)
    try:
        yield
    finally:
        _awaited.remove(thread)


def standing_still() -> tuple[str, float, threading.Thread] | None:
    """(what is waited for, seconds since its last byte, the thread that waits), or None where nothing is."""
    now = time.monotonic()
    innermost = {operation.thread: operation for operation in list(_under_way)}
    found = [(o.what, now - o.moved_at, thread) for thread, o in innermost.items() if thread in _awaited]
    return max(found, key=lambda entry: entry[1], default=None)
