"""A rank's eye on itself and on the others of its node, for the times when no collective would notice that one hangs.

Decides: when a rank counts as hung while files are stored or fetched, and as gone without a word. Leaves out: hanging
in a collective, which times out by itself; what is shown of a failure (`failures.py`).

Ranks wait for each other's files far longer than for a collective: a policy of a hundred gigabytes takes its time. So
each looks whether its own bytes still move, and touches `alive-N` in the job's folder `ranks`, which is there from its
start to its proper end.
"""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

from spinreg_core.stages.failures import alive, any_recorded, record
from spinreg_core.standstill import standing_still

POLL_SECONDS = 0.5  # of `job.die_with_parent`, whose thread calls `doomed`
_LATER_SECONDS = 5.0  # a rank that does not answer is left to the collectives first, which know where they waited


class RankWatch:
    """`timeout`: seconds of silence after which a rank counts as hung (`resources.collective_timeout_seconds`)."""

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        self.folder, self.rank, self.timeout = folder, rank, timeout
        self.seen: dict[int, tuple[float, int]] = {}  # rank: (time of its file, polls since that changed)
        self.file = folder / f"alive-{rank}"
        self.file.touch()

    def doomed(self) -> bool:
        """Whether a rank of this node has failed, so that this one is to end; called every POLL_SECONDS."""
        if not self._found():
            return False
        # What ends on its own account has left its stack: it was not killed by anyone else.
        stack = traceback.format_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        with open(self.folder / f"stack-{self.rank}.txt", "a") as file:
            file.writelines(stack)
        return True

    def _found(self) -> bool:
        """Look, and record what is found."""
        if any_recorded(self.folder):
            return True
        if self.file.exists():
            self.file.touch()
        if (still := standing_still()) is not None and still[1] > self.timeout:
            what, seconds, thread = still
            stack = traceback.format_stack(sys._current_frames().get(thread.ident or 0))
            message = (
                f"error: rank {self.rank}: {what} has stood still for {seconds:.0f} s "
                f"(resources.collective_timeout_seconds: {self.timeout:g}). It was here:\n{''.join(stack).rstrip()}"
            )
            record(self.folder, self.rank, 1, message)
            return True
        # Polls, not seconds: when all ranks were suspended and go on, none has been silent for longer than the others.
        for other, at in alive(self.folder).items():
            before, polls = self.seen.get(other, (at, 0))
            self.seen[other] = (at, polls + 1 if at == before else 0)
            if (self.seen[other][1] * POLL_SECONDS) > self.timeout + _LATER_SECONDS:
                message = (
                    f"error: rank {other} has not run for {self.timeout + _LATER_SECONDS:.0f} s "
                    f"(resources.collective_timeout_seconds: {self.timeout:g}): it is suspended, or gone without a word"
                )
                record(self.folder, other, 1, message)
                return True
        return False

    def finished(self) -> None:
        """The rank has done its part and ends."""
        self.file.unlink(missing_ok=True)
