"""Record the attempts at stages of a run, and the share of their time that was repeated.

Reads the work folders of the run's cache (`<run>/<place>/<writer>/log.txt`, where a place is `round-1-train`), from
outside, while they exist. An attempt lasts from the appearance of its folder to its end. The repeated time of an
uncommitted attempt is the time after its last shard or checkpoint, or all of its time if it left none.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import read_record
from spinreg_core.store.base import Store

_KEPT = re.compile(r"^(shard \d+ of \d+: |checkpoint step-\d+ committed)", re.M)


@dataclass
class Attempt:
    place: str
    writer: str
    begin: float
    end: float
    size: int = 0
    parts: int = 0
    kept: float | None = None  # when the commit of its last part was seen
    over: bool = False


class Attempts:
    """The attempts of a run, watched in a thread from `__enter__` to `__exit__`."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.all = cache, dict[Path, Attempt]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Attempts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for log in self.cache.glob("work/*/*/*/log.txt"):
                with contextlib.suppress(FileNotFoundError):  # removed after the listing
                    self._look(log, log.stat().st_size)

    def _look(self, log: Path, size: int) -> None:
        now = time.monotonic()
        attempt = self.all.setdefault(log, Attempt(log.parts[-3], log.parts[-2], now, now))
        if attempt.over:
            return
        attempt.end = now
        if size > attempt.size:
            attempt.size, parts = size, len(_KEPT.findall(log.read_text(errors="replace")))
            if parts > attempt.parts:
                attempt.parts, attempt.kept = parts, now

    def ended(self) -> None:
        """Close all attempts: their stages were just killed, and their folders stay."""
        for attempt in list(self.all.values()):
            attempt.over = True

    def begun(self, places: list[str], since: float) -> str | None:
        """Return the place of the newest attempt at any of `places` that began since then."""
        found = [a for a in list(self.all.values()) if a.begin >= since and a.place in places]
        return max(found, key=lambda a: a.begin).place if found else None

    def seconds(self, store: Store) -> dict[str, float]:
        """Return the seconds of all attempts, their repeated seconds, and the seconds of uncommitted attempts."""
        records = [read_record(store, name) for name in {key.split("/")[1] for key in store.list("objects/")}]
        done = {(_stage(r), r.writer) for r in records if r is not None}
        attempts = list(self.all.values())
        vain = [a for a in attempts if (a.place.split("-", 2)[-1], a.writer) not in done]
        return {
            "all": sum(a.end - a.begin for a in attempts),
            "repeated": sum(a.end - (a.kept or a.begin) for a in vain),
            "uncommitted": sum(a.end - a.begin for a in vain),
        }


def _stage(record: Manifest) -> str:
    return "prepare" if record.stage in ("data", "base", "prepare") else record.stage
