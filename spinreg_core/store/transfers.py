"""Registry of the transfers that the main thread waits for, and of the movement of their bytes.

Decides: the meaning of movement. Leaves out: the timeout, and ending a rank that the others wait for (`runtime/`).
Transfers of another thread count while the main thread waits for it. Otherwise a checkpoint that cannot be stored costs
that checkpoint, not the stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Transfer:
    """An operation of the store. `moves` increases whenever bytes have moved.

    A watcher compares `moves` and reads no clock here, because a process that was suspended has not been idle.
    """

    what: str
    thread: threading.Thread
    moves: int = 0

    def moved(self, _bytes: int = 0) -> None:
        self.moves += 1


_under_way: list[Transfer] = []  # an inner operation comes after its outer one
_awaited: list[threading.Thread] = [threading.main_thread()]


@contextmanager
def track_transfer(what: str) -> Iterator[Callable[[int], None]]:
    """Register an operation of the store. Call the function that this yields whenever bytes have moved."""
    operation = Transfer(what, threading.current_thread())
    _under_way.append(operation)
    try:
        yield operation.moved
    finally:
        _under_way.remove(operation)
        for outer in list(_under_way):
            if outer.thread is operation.thread:
                outer.moved()


@contextmanager
def main_thread_waits_for(thread: threading.Thread) -> Iterator[None]:
    """Count the transfers of a thread inside the block, in which the main thread waits for it."""
    _awaited.append(thread)
    try:
        yield
    finally:
        _awaited.remove(thread)


def watched_transfers() -> list[Transfer]:
    """Return the innermost operation of the main thread and of each thread that it waits for."""
    innermost = {operation.thread: operation for operation in list(_under_way)}
    return [operation for thread, operation in innermost.items() if thread in _awaited]
