"""Detection of ranks that hang where no collective would time out: during transfers of files, or suspended.

Decides: when a rank counts as hung during a transfer, and as gone. Leaves out: hanging in a collective, which has its
own timeout; the message of a failure (`runtime.failures`).

Ranks wait for each other's files far longer than for a collective, because a policy may have a hundred gigabytes. So
each rank checks that its own transfers advance, and touches `alive-N` in the job's folder `ranks`, from its start until
it finishes.
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

# The interval at which the thread of `supervision.die_with_parent` calls `should_exit`.
POLL_SECONDS = 0.5
# A collective that times out first knows where it waited, so a silent rank is reported this much later.
_LATER_SECONDS = 5.0


class RankWatch:
    """Watches the ranks of this node. `timeout`: seconds of silence before a rank counts as hung.

    Silence is counted in polls, so a job that was suspended as a whole and continues has no silent rank.
    """

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        self.folder, self.rank, self.timeout = folder, rank, timeout
        self.limit = f"(resources.collective_timeout_seconds: {timeout:g})"
        # By rank: the time of its file, and the polls since that changed.
        self.others: dict[int, tuple[float, int]] = {}
        # The moves of each transfer, and the polls since they changed.
        self.own: dict[Transfer, tuple[int, int]] = {}
        self.file = folder / f"alive-{rank}"
        self.file.touch()
        self._doomed = False

    def should_exit(self) -> bool:
        """Return True once a rank of this node has failed, so that this one must end. Called every POLL_SECONDS."""
        if self._doomed:
            return True
        # A full or stale file system must not end the thread of this check: it also ends ranks that lost their parent.
        with contextlib.suppress(OSError):
            self._doomed = self._found()
        if self._doomed:
            # A rank with a stack was not killed from outside (`failures.root_failure`).
            with contextlib.suppress(OSError), open(self.folder / f"stack-{self.rank}.txt", "a") as file:
                file.write(_stack(threading.main_thread()))
        return self._doomed

    def _found(self) -> bool:
        """Check the ranks once, and record a hung one."""
        if any_recorded(self.folder):
            return True
        # The file is gone once this rank has finished.
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.file)
        self.own = {o: _polled(self.own.get(o), o.moves) for o in watched_transfers()}
        for operation, (_, polls) in self.own.items():
            if (seconds := polls * POLL_SECONDS) > self.timeout:
                message = (
                    f"error: rank {self.rank}: {operation.what} made no progress for {seconds:.0f} s {self.limit}."
                )
                record(self.folder, self.rank, 1, f"{message} It was here:\n{_stack(operation.thread)}")
                return True
        for other, at in alive(self.folder).items():
            self.others[other] = _polled(self.others.get(other), at)
            if (seconds := self.others[other][1] * POLL_SECONDS) > self.timeout + _LATER_SECONDS:
                message = f"error: rank {other} has not run for {seconds:.0f} s {self.limit}"
                record(self.folder, other, 1, f"{message}: it is suspended, or ended without a message")
                return True
        return False

    def finished(self) -> None:
        """Mark this rank as finished."""
        self.file.unlink(missing_ok=True)


def _polled(before: tuple[Any, int] | None, now: Any) -> tuple[Any, int]:
    return (now, before[1] + 1) if before is not None and before[0] == now else (now, 0)


def _stack(thread: threading.Thread) -> str:
    return "".join(traceback.format_stack(sys._current_frames().get(thread.ident or 0))).rstrip()
