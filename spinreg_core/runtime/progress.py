"""Progress lines of a stage: done/total, rate and time left, for people and for the task to parse.

Decides: the format of the line. Leaves out: showing it (terminal, log, Prefect artifact).
"""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import dataclass

_LINE = re.compile(r"^\[[^\]]+\] (\d+)/(\d+) \S+ \(\d+ %\), [0-9.]+/s, \d+:\d\d:\d\d left(?:; .+)?$")


@dataclass(frozen=True)
class ProgressLine:
    text: str
    done: int
    total: int


class Progress:
    """Counts units of work and prints a line at most every `every` seconds, and one at the end."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0, every: float = 2.0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._every, self._start, self._start_done = every, time.monotonic(), done
        self._last, self._showing = -float("inf"), threading.Lock()
        # Text at the end of the line.
        self.note = ""

    def update(self, n: int = 1) -> None:
        self.done += n
        self._show()

    def tell(self, note: str) -> None:
        """Change the text at the end of the line. Unlike `update`, it may be called from any thread."""
        self.note = note
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        with self._showing:
            if now - self._last < self._every and self.done < self.total:
                return
            self._last = now
            rate = (self.done - self._start_done) / max(now - self._start, 1e-6)
            left = int((self.total - self.done) / rate) if rate > 0 else 0
            # One write: `print` writes the line's end separately, and lines of two threads or processes would mix.
            sys.stdout.write(
                f"[{self.stage}] {self.done}/{self.total} {self.unit} "
                f"({100 * self.done // max(self.total, 1)} %), {rate:.2f}/s, "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
                + (f"; {self.note}\n" if self.note else "\n")
            )
            sys.stdout.flush()


def parse(line: str) -> ProgressLine | None:
    """Return the progress in a line, or None for any other line."""
    match = _LINE.match(line.strip())
    return None if match is None else ProgressLine(match[0], int(match[1]), int(match[2]))
