"""Which files of the store the main thread waits for, and whether their bytes move.

Decides: what counts as movement. Leaves out: for how long none is too long, and what follows (`runtime/rank_watch.py`:
a rank that the others wait for ends). Other threads count while the main one waits for them: a checkpoint that cannot
be stored meanwhile costs a checkpoint, not the stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Transfer:
    """`moves` is counted up whenever bytes have moved; who watches looks whether it changes, not at a clock, because a
    process that was suspended has not been idle."""

    what: str
    thread: threading.Thread
    moves: int = 0

    def moved(self, _bytes: int = 0) -> None:
        self.moves += 1


_under_way: list[Transfer] = []  # inner ones after outer ones
_awaited: list[threading.Thread] = [threading.main_thread()]


@contextmanager
def track_transfer(what: str) -> Iterator[Callable[[int], None]]:
    """Around an operation of the store. The function given is to be called whenever bytes have moved."""
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
    """While the main thread waits for another one."""
    _awaited.append(thread)
    try:
        yield
    finally:
        _awaited.remove(thread)


def watched_transfers() -> list[Transfer]:
    """The innermost operation of each thread that the main one is or waits for."""
    innermost = {operation.thread: operation for operation in list(_under_way)}
    return [operation for thread, operation in innermost.items() if thread in _awaited]
