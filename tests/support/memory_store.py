"""A store in memory for two writers: its requests are the steps of a scheduler, and it checks what must always hold."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Protocol

from spinreg_core.errors import Conflict
from spinreg_core.runs.head import config_key, head_key


class Steps(Protocol):
    """Decides which writer moves next, and collects what went wrong."""

    problems: list[str]

    def step(self, writer: int) -> bool: ...


class Memory:
    """A store whose requests are steps, and which checks what must hold after each."""

    url = "memory"

    def __init__(self, scheduler: Steps | None, data: dict[str, bytes]) -> None:
        self.scheduler, self.data, self.writer = scheduler, data, threading.local()

    def step(self) -> bool:
        return self.scheduler is not None and self.scheduler.step(self.writer.number)

    def check(self) -> None:
        pass

    def uri(self, key: str) -> str:
        return key

    def read(self, key: str) -> bytes | None:
        self.step()
        return self.data.get(key)

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        found = self.read(key)
        return None if found is None else (found, tag(found))

    def create(self, key: str, data: bytes) -> str:
        lost = self.step()
        if self.data.get(key, data) != data:
            raise Conflict(key)
        return self.put(key, data, lost)

    def replace(self, key: str, data: bytes, expected: str) -> str:
        lost = self.step()
        if key not in self.data or tag(self.data[key]) != expected:
            raise Conflict(key)
        return self.put(key, data, lost)

    def upload(self, path: Path, key: str) -> None:
        self.step()
        self.put(key, path.read_bytes())

    def delete(self, key: str) -> None:
        assert key.startswith("probes/"), "the only keys that go, and no step: nobody else knows of them"
        self.data.pop(key, None)

    def size(self, key: str) -> int | None:
        self.step()
        return len(self.data[key]) if key in self.data else None

    def list(self, prefix: str) -> list[str]:
        self.step()
        return sorted(key for key in self.data if key.startswith(prefix))

    def put(self, key: str, data: bytes, lost: bool = False) -> str:
        before, self.data[key] = self.data.get(key), data
        if self.scheduler is not None and before is not None and before != data:
            problem = self._problem(key, before, data)
            if problem:
                self.scheduler.problems.append(problem)
        if lost:
            raise Conflict(key)
        return tag(data)

    def _problem(self, key: str, before: bytes, after: bytes) -> str | None:
        if key == config_key("r") or key.startswith("probes/"):
            return None  # of a run that has not begun, and of no run
        if key != head_key("r"):
            return f"{key} was written over"
        old, new = json.loads(before), json.loads(after)
        if new["lease"]["epoch"] < old["lease"]["epoch"]:
            return "the epoch fell"
        committed = [(e["round"], stage, found) for e in old["rounds"] for stage, found in e["stages"].items()]
        now = {(e["round"], stage): found for e in new["rounds"] for stage, found in e["stages"].items()}
        if any(now.get((number, stage)) != found for number, stage, found in committed):
            return "a committed stage was changed"
        if any(old.get(name) not in (None, new.get(name)) for name in ("base", "data")):
            return "a committed input was changed"
        if new["rounds"] != old["rounds"]:
            if new["lease"]["epoch"] != old["lease"]["epoch"]:
                return "a stage was committed with a change of the lease"
            if new["lease"]["holder"] is None or new["lease"]["holder"]["label"] != str(self.writer.number):
                return f"writer {self.writer.number} committed under the lease of {new['lease']['holder']}"
        return None


def tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clock:
    """In place of the module `time`: every sleep lasts longer than any lease, for who sleeps."""

    def __init__(self, store: Memory) -> None:
        self._store, self._now = store, threading.local()

    def monotonic(self) -> float:
        return getattr(self._now, "seconds", 0.0)

    def sleep(self, seconds: float) -> None:
        self._store.step()
        self._now.seconds = self.monotonic() + 1e6
