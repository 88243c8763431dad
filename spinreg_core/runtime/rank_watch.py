"""A rank's eye on itself and on the others of its node, for the times when no collective would notice that one hangs.

Decides: when a rank counts as hung while files are stored or fetched, and as gone without a word. Leaves out: hanging
in a collective, which times out by itself; what is shown of a failure (`failures.py`).

Ranks wait for each other's files far longer than for a collective: a policy of a hundred gigabytes takes its time. So
each looks whether its own bytes still move, and touches `alive-N` in the job's folder `ranks`, which is there from its
start to its proper end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from spinreg_core.runtime.failures import alive, any_recorded, record
from spinreg_core.store.transfers import Transfer, watched_transfers

POLL_SECONDS = 0.5  # of `job.die_with_parent`, whose thread calls `should_exit`
_LATER_SECONDS = 5.0  # a rank that does not answer is left to the collectives first, which know where they waited


class RankWatch:
    """`timeout`: seconds of silence after which a rank counts as hung (`resources.collective_timeout_seconds`).

    Silence is counted in polls: when all ranks were suspended and go on, none has been silent.
    """

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        self.folder, self.rank, self.timeout = folder, rank, timeout
        self.limit = f"(resources.collective_timeout_seconds: {timeout:g})"
        self.others: dict[int, tuple[float, int]] = {}  # rank: (time of its file, polls since that changed)
        self.own: dict[Transfer, tuple[int, int]] = {}  # (its moves, polls since that changed)
        self.file = folder / f"alive-{rank}"
        self.file.touch()
        self._doomed = False

    def should_exit(self) -> bool:
        """Whether a rank of this node has failed, so that this one is to end; called every POLL_SECONDS."""
        if self._doomed:
            return True
        # A full or stale file system must not end this look-out, which also sees to it that no rank outlives its job.
        with contextlib.suppress(OSError):
            self._doomed = self._found()
        if self._doomed:
            # What ends on its own account has left its stack: it was not killed by anyone else.
            with contextlib.suppress(OSError), open(self.folder / f"stack-{self.rank}.txt", "a") as file:
                file.write(_stack(threading.main_thread()))
        return self._doomed

    def _found(self) -> bool:
        """Look, and record what is found."""
        if any_recorded(self.folder):
            return True
        with contextlib.suppress(FileNotFoundError):  # finished
            os.utime(self.file)
        self.own = {o: _polled(self.own.get(o), o.moves) for o in watched_transfers()}
        for operation, (_, polls) in self.own.items():
            if (seconds := polls * POLL_SECONDS) > self.timeout:
                message = f"error: rank {self.rank}: {operation.what} has stood still for {seconds:.0f} s {self.limit}."
                record(self.folder, self.rank, 1, f"{message} It was here:\n{_stack(operation.thread)}")
                return True
        for other, at in alive(self.folder).items():
            self.others[other] = _polled(self.others.get(other), at)
            if (seconds := self.others[other][1] * POLL_SECONDS) > self.timeout + _LATER_SECONDS:
                message = f"error: rank {other} has not run for {seconds:.0f} s {self.limit}"
                record(self.folder, other, 1, f"{message}: it is suspended, or gone without a word")
                return True
        return False

    def finished(self) -> None:
        """The rank has done its part and ends."""
        self.file.unlink(missing_ok=True)


def _polled(before: tuple[Any, int] | None, now: Any) -> tuple[Any, int]:
    return (now, before[1] + 1) if before is not None and before[0] == now else (now, 0)


def _stack(thread: threading.Thread) -> str:
    return "".join(traceback.format_stack(sys._current_frames().get(thread.ident or 0))).rstrip()
